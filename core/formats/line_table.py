"""Tables of canonical JSON lines: written as a stream, hashed once when opened, read entry by entry.

`inputs.jsonl` and `sources.jsonl` of a dataset are such tables and may have millions of lines, so at most one block
of the file and 8 bytes a line are in memory. Entries are not read through a memory map: mapped pages count as the
process's memory, and truncating the file would kill the process.

    written = write_lines(path, ({"name": name} for name in names))
    table = LineTable(path, Entry.model_validate, sha256=written.sha256)
    table[3], len(table), list(table)
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from weftrain.core.errors import DataError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.plain_file import MAX_LINE_BYTES, check_size, open_plain

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MAX_LINES = 1 << 26  # 512 MiB of line offsets
_BLOCK_BYTES = 1 << 22
_LINE_BREAK = 10


@dataclass(frozen=True)
class WrittenLines:
    """sha256: of the file. count: its lines."""

    sha256: str
    count: int


def write_lines(path: Path, values: Iterable[Any]) -> WrittenLines:
    """Write each value as a line of canonical JSON, atomically.

    Raises OSError, ValueError for a value that is not JSON or a line that LineTable would not read.
    """
    digest, count = hashlib.sha256(), 0

    def blocks() -> Iterator[bytearray]:
        nonlocal count
        waiting = bytearray()
        for value in values:
            waiting += _line(value)
            count += 1
            if count > MAX_LINES:
                raise ValueError(f"{path.name}: more than {MAX_LINES:,} lines")
            if len(waiting) >= _BLOCK_BYTES:
                digest.update(waiting)
                yield waiting
                waiting = bytearray()
        digest.update(waiting)
        yield waiting

    fsops.write_blocks(path, blocks())
    return WrittenLines(digest.hexdigest(), count)


def lines_sha256(values: Iterable[Any]) -> str:
    """The SHA-256 of the file that write_lines would write."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(_line(value))
    return digest.hexdigest()


def _line(value: Any) -> bytes:
    line = canonical_json(value) + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(
            f"{line[:60].decode(errors='replace')}…: a line of {len(line):,} bytes, {MAX_LINE_BYTES:,} are allowed"
        )
    return line


class Lines(Protocol[T_co]):
    """Entries by number: a LineTable, or a list of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> T_co: ...
    def __iter__(self) -> Iterator[T_co]: ...


class LineTable(Generic[T]):
    """The lines of a file, each parsed when it is accessed. Safe to read from several threads.

    parse: makes an entry from a line's JSON value; its ValueErrors are reported with the line number. sha256: the
    file's required hash, if any. remedy: ends every message. Raises DataError for a file that is missing, has another
    hash, no final line break, too long a line or too many.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[Any], T],
        *,
        sha256: str | None = None,
        remedy: str = "remove the dataset and prepare it again",
    ) -> None:
        self.path, self._parse, self._remedy = path, parse, remedy
        try:
            self._file = open_plain(path, buffering=0)
            weakref.finalize(self, self._file.close)
            check_size(path, "line table", os.fstat(self._file.fileno()).st_size)
            self.sha256, self._starts = self._scan()
        except FileNotFoundError:
            raise self._error("is missing") from None
        except (OSError, ValueError) as error:
            raise self._error(str(error)) from error
        if sha256 is not None and self.sha256 != sha256:
            self.close()
            raise self._error(f"hashes to {self.sha256[:12]}…, not to the recorded {sha256[:12]}…, so it was altered")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> T:
        """Entry `index`, from 0. Raises DataError, for an unknown index too: indices come from other files."""
        if not 0 <= index < len(self):
            raise self._error(f"has {len(self):,} lines, and line {index + 1:,} is asked for")
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        return self._entry(index, self._read(start, stop - start)[:-1])

    def __iter__(self) -> Iterator[T]:
        """All entries in order, a block of the file in memory at a time."""
        first = 0
        while first < len(self):
            start = int(self._starts[first])
            stop_line = max(first + 1, int(np.searchsorted(self._starts, start + _BLOCK_BYTES, side="right")) - 1)
            data = self._read(start, int(self._starts[stop_line]) - start)
            for index, line in enumerate(data.split(b"\n")[:-1], start=first):
                yield self._entry(index, line)
            first = stop_line

    def __enter__(self) -> LineTable[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file: entries can no longer be read."""
        self._file.close()

    def _scan(self) -> tuple[str, np.ndarray]:
        """The file's SHA-256, and int64 [lines + 1]: the offset of each line, and of the file's end."""
        digest, size, lines, last = hashlib.sha256(), 0, 0, 0
        starts = [np.zeros(1, np.int64)]
        while block := self._file.read(_BLOCK_BYTES):
            digest.update(block)
            found = np.flatnonzero(np.frombuffer(block, np.uint8) == _LINE_BREAK) + (size + 1)
            size += len(block)
            longest = size - last
            if len(found):
                longest = max(int(np.diff(found, prepend=last).max()), size - int(found[-1]))
                starts.append(found)
                lines, last = lines + len(found), int(found[-1])
            if longest > MAX_LINE_BYTES:
                raise ValueError(f"has a line of more than {MAX_LINE_BYTES:,} bytes")
            if lines > MAX_LINES:
                raise ValueError(f"has more than {MAX_LINES:,} lines")
        if last != size:
            raise ValueError("does not end with a line break, so it was truncated")
        return digest.hexdigest(), np.concatenate(starts)

    def _read(self, start: int, size: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), size, start)
        except (OSError, ValueError) as error:
            raise self._error(f"cannot be read: {error}") from error
        if len(data) != size:
            raise self._error("was truncated after it was opened")
        return data

    def _entry(self, index: int, line: bytes) -> T:
        try:
            return self._parse(parse_json(line))
        except ValueError as error:  # pydantic's too
            raise self._error(f"line {index + 1:,}: {one_line(error)}") from error

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self.path}: {problem}; {self._remedy}")
