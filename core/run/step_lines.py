"""Many lines of metrics at once: step lines that differ from one before them in their numbers alone.

A month of training leaves a million step lines of one shape. `LineShape` is a regular expression made from a line that
was read and checked; any other line that it matches is checked by that, and its figures are taken as columns. What has
another shape is read as any line is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic_core import from_json

from weftrain.core.formats.plain_file import MAX_LINE_BYTES, UnreadableFileError, check_size, open_plain

_BLOCK_BYTES = 1 << 18  # read at once
_MAX_SHAPES = 10_000  # made in one reading, at a millisecond each
_STEP = b'{"kind": "step", '
_OTHER = re.compile(rb"\n(?!\{\"kind\": \"step\", )")  # the end of a line that no step line follows
# as json.dumps writes them; possessive, since what follows a number never belongs to it
_NUMBER = r"-?+(?:0|[1-9][0-9]{0,17}+)(?:\.[0-9]{1,25}+)?+(?:e[-+][0-9]{1,3}+)?+"
_READ = r"[-+.0-9e]{1,40}+"  # a number that is parsed as JSON afterwards, which is strict: matched in half the time
_COUNT = r"(?:0|[1-9][0-9]{0,14})"
_TIME = r"(?:0|[1-9][0-9]{0,10})(?:\.[0-9]{1,25})?"
_COUNTED = ("step", "tokens", "bearing_tokens", "rows", "rows_available", "torn_lines")
_TOKENS = {"time": _TIME, "skipped": "true|false", **dict.fromkeys(_COUNTED, _COUNT)}


class LineShape:
    """The step lines that have the keys of `record`, in its order, and its texts. columns: numbers to be taken."""

    def __init__(self, record: Mapping[str, Any], columns: Callable[[str], bool]) -> None:
        self._names: list[str] = []
        self._lines = re.compile(f"(?:{self._line(record, lambda name: False)}\n)*".encode())
        # from a line's beginning: a line that a crash tore may hold the whole next one
        self._each = re.compile(f"(?m)^{self._line(record, columns)}\n".encode())

    def _line(self, record: Mapping[str, Any], columns: Callable[[str], bool]) -> str:
        parts = []
        for key, value in record.items():
            if key == "learning_rate":
                rates = ", ".join(f"{_text(name)}: {self._token(f'{key}/{name}', 0.0, columns)}" for name in value)
                parts.append(rf"{_text(key)}: \{{{rates}\}}")
            else:
                parts.append(f"{_text(key)}: {self._token(key, value, columns)}")
        return rf"\{{{', '.join(parts)}\}}"

    def _token(self, name: str, value: Any, columns: Callable[[str], bool]) -> str:
        if name not in _TOKENS and type(value) not in (int, float):
            return _text(value)
        if not columns(name):
            return f"(?:{_TOKENS.get(name, _NUMBER)})"
        self._names.append(name)
        return f"({_TOKENS.get(name, _READ)})"

    def matches(self, lines: bytes) -> bool:
        """Whether all lines are of this shape."""
        return self._lines.fullmatch(lines) is not None

    def columns(self, lines: bytes, count: int) -> dict[str, np.ndarray] | None:
        """The figures asked for of the lines of this shape, float64 and for `step` int64, by name (a rate is
        learning_rate/<group>); None unless there are `count` of them.
        """
        rows = self._each.findall(lines)
        if len(rows) != count:
            return None
        texts = chain.from_iterable(rows) if len(self._names) > 1 else rows
        try:
            numbers = from_json(b"[" + b",".join(texts) + b"]")
        except ValueError:
            return None  # such as 1.5.5
        table = np.array(numbers, np.float64).reshape(len(rows), len(self._names))
        return {name: _column(name, table[:, place]) for place, name in enumerate(self._names)}


def _shape_of(record: Mapping[str, Any], line: bytes, columns: Callable[[str], bool] | None) -> LineShape | None:
    """The shape of a line without its break, whose checked record this is; None where it is written in another way."""
    if any(isinstance(value, dict | list | tuple) and key != "learning_rate" for key, value in record.items()):
        return None
    shape = LineShape(record, (lambda name: False) if columns is None else lambda name: name == "step" or columns(name))
    return shape if shape.matches(line + b"\n") else None


def _text(value: Any) -> str:
    return re.escape(json.dumps(value, ensure_ascii=False))


def _column(name: str, numbers: np.ndarray) -> np.ndarray:
    """numbers: float64, which holds every step exactly (they have 15 digits at most)."""
    if name == "skipped":
        return numbers != 0
    return numbers.astype(np.int64) if name == "step" else numbers


class StepColumns(NamedTuple):
    """Consecutive step lines, the last of them line `number`. figures: by name, without `step`. last: that line.
    left_by: line of the resume that went behind all of them; 0: they count.
    """

    number: int
    steps: np.ndarray  # int64
    figures: Mapping[str, np.ndarray]
    last: bytes
    left_by: int = 0

    def column(self, name: str) -> np.ndarray:
        """A figure, float64 or for `skipped` bool; NaN where the lines do not have it."""
        return self.figures.get(name, np.full(len(self.steps), np.nan))


class StepShapes:
    """The shape of the newest step line that was read by itself. columns: whether a figure of that name is wanted."""

    def __init__(self, columns: Callable[[str], bool] | None = None) -> None:
        self.wanted = columns is not None
        self._columns = columns
        self._shape: LineShape | None = None
        self._made = 0

    def match(self, lines: bytes) -> bool:
        """Whether all lines have that shape."""
        return self._shape is not None and self._shape.matches(lines)

    def columns(self, groups: Sequence[LineGroup], lines: bytes) -> list[StepColumns] | None:
        """Groups of step lines as columns, which are taken at once; None unless all of them have that shape.

        lines: those of the groups, and any that are no step lines.
        """
        count = sum(group.size for group in groups)
        if self._shape is None or (figures := self._shape.columns(lines, count)) is None:
            return None
        steps, found, begin = figures.pop("step"), list[StepColumns](), 0
        for group in groups:
            end = begin + group.size
            own = {name: column[begin:end] for name, column in figures.items()}
            found.append(StepColumns(group.number + group.size - 1, steps[begin:end], own, group.last))
            begin = end
        return found

    def note(self, record: Mapping[str, Any], line: bytes) -> bool:
        """A line that was read by itself and checked, as this record. Whether it has a new shape, which counts now."""
        if record["kind"] != "step" or self._made == _MAX_SHAPES or self.match(line + b"\n"):
            return False
        self._made += 1
        shape = _shape_of(record, line, self._columns)
        self._shape = shape or self._shape
        return shape is not None


class LineGroup(NamedTuple):
    """Whole lines that follow one another, each with its break; `size` of them, the first is line `number`. steps: all
    of them begin as step lines do.
    """

    number: int
    size: int
    data: bytes
    steps: bool

    @property
    def first(self) -> bytes:
        """The first line, without its break."""
        return self.data[: self.data.index(b"\n")]

    @property
    def last(self) -> bytes:
        """The last line, without its break."""
        return self.data[self.data.rfind(b"\n", 0, -1) + 1 : -1]

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Each line's number, and the line without its break."""
        return enumerate(self.data.split(b"\n")[: self.size], self.number)


def line_groups(path: Path, *, begin: int = 0, number: int = 1, stop: int | None = None) -> Iterator[LineGroup]:
    """The whole lines of metrics, in pieces that fit in memory. begin: byte at which line `number` begins; stop: up to
    which is read. Raises UnreadableFileError, OSError.
    """
    return chain.from_iterable(groups for _, groups in line_blocks(path, begin=begin, number=number, stop=stop))


def line_blocks(
    path: Path, *, begin: int = 0, number: int = 1, stop: int | None = None
) -> Iterator[tuple[bytes, Sequence[LineGroup]]]:
    """`line_groups`, those that are read at once together, behind the bytes that they are parts of. These may end with
    the beginning of a line that is not whole yet.
    """
    rest = b""
    with open_plain(path) as file:
        check_size(path, "metrics", file.seek(0, 2))
        file.seek(begin)
        while block := file.read(_BLOCK_BYTES if stop is None else min(_BLOCK_BYTES, stop - file.tell())):
            block = rest + block
            cut = block.rfind(b"\n") + 1
            rest = block[cut:]
            if len(rest) > MAX_LINE_BYTES:
                raise _too_long(path)
            groups = list(_groups(path, block, cut, number))
            number += sum(group.size for group in groups)
            yield block, groups


def _groups(path: Path, block: bytes, cut: int, number: int) -> Iterator[LineGroup]:
    """The groups of a block's first `cut` bytes, whole lines."""
    at = 0
    while at < cut:
        steps = block.startswith(_STEP, at)
        if steps:
            other = _OTHER.search(block, at, cut - 1)
            end = cut if other is None else other.start() + 1
        else:
            end = block.index(b"\n", at) + 1
        data = block[at:end]
        if len(data) > MAX_LINE_BYTES and max(map(len, data.split(b"\n"))) > MAX_LINE_BYTES:
            raise _too_long(path)
        size = data.count(b"\n") if steps else 1
        yield LineGroup(number, size, data, steps)
        number, at = number + size, end


def lines_from_the_end(path: Path, word: bytes, end: int | None = None) -> Iterator[bytes]:
    """The whole lines of metrics that hold `word`, without their breaks, the last one first, read as they are asked
    for. end: byte before which a line ends, from which on nothing is read.

    Raises UnreadableFileError, OSError.
    """
    with open_plain(path) as file:
        at, text = file.seek(0, 2), b""
        check_size(path, "metrics", at)
        at = at if end is None else min(end, at)
        while at:
            size = min(_BLOCK_BYTES, at)
            at = file.seek(at - size)
            text = file.read(size) + text
            first = text.find(b"\n") + 1 if at else 0  # what stands before it may be the end of a line
            if at and not first:
                if len(text) > MAX_LINE_BYTES:
                    raise _too_long(path)
                continue
            lines, text = text[first:], text[:first]
            end = lines.rfind(b"\n") + 1  # what follows is torn
            while (found := lines.rfind(word, 0, end)) >= 0:
                end = lines.rfind(b"\n", 0, found) + 1
                yield lines[end : lines.index(b"\n", found)]


def newest_lines(path: Path, size_bytes: int) -> int:
    """The byte at which the newest whole lines of metrics begin that take at most so many bytes. Raises OSError."""
    with open_plain(path) as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - size_bytes - 1))
        return 0 if end <= size_bytes else file.tell() + len(file.readline(MAX_LINE_BYTES + 1))


def _too_long(path: Path) -> UnreadableFileError:
    return UnreadableFileError(f"has a line of more than {MAX_LINE_BYTES:,} bytes", path)
