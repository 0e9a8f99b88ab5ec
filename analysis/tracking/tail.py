"""New whole lines of a file that a run appends to, and which of them still count.

A position names the last line that was read by its place and its hash, so that it is found again after damaged lines
before it were moved away (`repair` in core/run/metrics.py).
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from weftrain.core.errors import RunFolderError
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import MAX_LINE_BYTES, open_plain
from weftrain.core.formats.strict_model import Count, StrictModel
from weftrain.core.run.metrics_lines import MEASURED, checked_line


class Position(StrictModel):
    """After the first `lines` lines, which take `bytes` bytes. sha256: of the last of them, "" at the beginning."""

    lines: Count = 0
    bytes: Count = 0
    sha256: str = ""


class NewLine(NamedTuple):
    """The line of this number, the byte after it, its text, and what it says: None for a damaged one, and for a
    measurement that counts no more.
    """

    number: int
    stop: int
    data: bytes
    line: dict[str, Any] | None
    damaged: bool

    @property
    def end(self) -> Position:
        """Where the line ends."""
        return Position(lines=self.number, bytes=self.stop, sha256=hashlib.sha256(self.data).hexdigest())


class NewLines:
    """What was appended to metrics.jsonl after a position. back_to: the lowest step that the run went back to since
    then; None where it did not.
    """

    def __init__(self, path: Path, after: Position) -> None:
        self._path, self._after = path, after
        resumes: list[tuple[int, int]] = []
        self._count = 0
        for number, data, _ in _lines(path, self._after):
            self._count += 1
            if b'"resume"' in data and (found := _checked(data)) is not None and found["kind"] == "resume":
                resumes.append((number, found["step"]))
        self._resumes = [number for number, _ in resumes]
        # of the i-th resume and those after it, the lowest step
        self._lowest = [*reversed(list(accumulate((step for _, step in reversed(resumes)), min))), math.inf]
        self.back_to = int(self._lowest[0]) if resumes else None

    def __iter__(self) -> Iterator[NewLine]:
        # Not more than the survey saw: a run that goes on may have gone back since.
        for number, data, stop in _lines(self._path, self._after, self._count):
            line = _checked(data)
            lowest = self._lowest[bisect_right(self._resumes, number)]
            left = line is not None and line["kind"] in MEASURED and line["step"] > lowest
            yield NewLine(number, stop, data, None if left else line, line is None)


def new_entries(path: Path, after: Position) -> tuple[list[dict[str, Any]], Position]:
    """The entries of a ledger after a position, and where they end. Raises RunFolderError for a damaged one."""
    entries, number, end, last = list[dict[str, Any]](), after.lines, after.bytes, b""
    for number, last, end in _lines(path, after):  # noqa: B007 wanted after the loop
        try:
            entry = parse_json(last)
            if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
                raise ValueError("it has no kind")
        except ValueError as error:
            raise RunFolderError(f"{path}:{number}: damaged: {error}: `weftrain log` says what to do") from error
        entries.append(entry)
    return entries, Position(lines=number, bytes=end, sha256=hashlib.sha256(last).hexdigest()) if entries else after


def found_again(path: Path, position: Position) -> Position:
    """Where the line of `position` is now. Raises RunFolderError if the file does not hold it any more."""
    if not position.lines:
        return Position()
    before = Position(lines=position.lines - 1, bytes=_line_start(path, position.bytes))
    for start, limit in ((before, 1), (Position(), None)):
        for number, data, end in _lines(path, start, limit):
            if hashlib.sha256(data).hexdigest() == position.sha256:
                return Position(lines=number, bytes=end, sha256=position.sha256)
    raise RunFolderError(
        f"{path}: does not hold the line that was sent last, so it is another file than it was: give the run its own "
        "file back, or delete the tracker's file in the folder tracking, and the run is sent anew"
    )


def _line_start(path: Path, end: int) -> int:
    """Where the line begins whose line break is before byte `end`."""
    if not path.exists():
        return 0
    with open_plain(path) as file:
        block = 1 << 12
        while True:
            start = max(0, end - 1 - block)
            file.seek(start)
            found = file.read(max(0, end - 1 - start)).rfind(b"\n")
            if found >= 0 or not start or block > MAX_LINE_BYTES:
                return start + found + 1
            block *= 16


def _lines(path: Path, after: Position, limit: int | None = None) -> Iterator[tuple[int, bytes, int]]:
    """(number, line without its line break, byte after it) of whole lines; nothing where there is no file."""
    if not path.exists():
        return
    number, end = after.lines, after.bytes
    with open_plain(path) as file:
        file.seek(end)
        while (limit is None or number < after.lines + limit) and (data := file.readline(MAX_LINE_BYTES + 1)):
            if data[-1] != 10:
                if len(data) > MAX_LINE_BYTES:
                    raise RunFolderError(f"{path}: has a line of more than {MAX_LINE_BYTES:,} bytes")
                return
            number, end = number + 1, end + len(data)
            yield number, data[:-1], end


def _checked(data: bytes) -> dict[str, Any] | None:
    try:
        return checked_line(data)
    except ValueError:
        return None  # the next start of the run moves it away
