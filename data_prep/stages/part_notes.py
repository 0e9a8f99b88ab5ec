"""What a part records besides its documents: the shares it read, and the documents it could not read.

Both are written and read in a bounded buffer, so that neither many files nor millions of damaged lines fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.data_prep.readers.documents import Failure, FileRead
from weftrain.data_prep.stages.table_file import damaged

_BUFFER_BYTES = 1 << 20


class Shares:
    """The shares that a part has read, in order: [file, begin, records, SHA-256]."""

    def __init__(self) -> None:
        self.listed: list[list[Any]] = []
        self._file, self._records = -1, 0

    def add(self, read: FileRead) -> None:
        self._file, self._records = read.share.file, read.records + self.before(read.share.file)
        self.listed.append([read.share.file, read.share.begin, read.records, read.sha256])

    def before(self, file: int) -> int:
        """Records in the part's earlier shares of this file."""
        return self._records if self._file == file else 0


class FailureList:
    """A part's failures, in a file that appears when the block ends, if there are any. count: so far."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._buffer = bytearray()
        self._file: fsops.FileWriter | None = None

    def add(self, failure: Failure) -> None:
        """failure: with a record that counts from where the part begins in the file. Raises OSError."""
        self.count += 1
        self._buffer += canonical_json([failure.file, failure.record, failure.reason]) + b"\n"
        if len(self._buffer) >= _BUFFER_BYTES:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            self._file = fsops.FileWriter(fsops.temporary_beside(self.path))
        self._file.write(self._buffer)
        self._buffer.clear()

    def __enter__(self) -> FailureList:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self.count:
            self._write()
            assert self._file is not None
            self._file.sync()
            fsops.rename(self._file.path, self.path)
        if self._file is not None:
            self._file.close()


def read_failures(path: Path) -> Iterator[Failure]:
    """A part's failures; records count from where the part begins. Raises DataError."""
    try:
        with open(path, "rb") as file:
            for line in file:
                yield Failure(*parse_json(line))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path, error, path.parent.parent) from error


def read_note(path: Path) -> dict[str, Any]:
    """What a part recorded when it was done. Raises DataError."""
    try:
        note: dict[str, Any] = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, error, path.parent.parent) from error
    return note


def in_blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines joined into blocks of about a megabyte."""
    buffer = bytearray()
    for line in lines:
        buffer += line
        if len(buffer) >= _BUFFER_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)
