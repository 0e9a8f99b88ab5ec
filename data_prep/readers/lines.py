"""Lines of a share of a file, for readers of JSON lines."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterator
from typing import IO

from weftrain.core.errors import DataError
from weftrain.data_prep.inputs.compression import Decompressed, begins_compressed, compression_of, open_decompressed
from weftrain.data_prep.inputs.files import BLOCK_BYTES, open_address
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.read_options import ReadOptions

_SKIP_BYTES = 1 << 20
Convert = Callable[[int, bytes | None], Document | Failure]


class LineSource:
    """The lines of a file that begin at `begin` or later, and before `end` unless it is None. Positions are bytes of
    the raw file (compression.py). Used in a `with`. Raises DataError, OSError.
    """

    def __init__(self, address: str, begin: int, end: int | None) -> None:
        last, self._end = b"", end
        self._archive: Decompressed | None = None
        self._opened: IO[bytes]
        if compression_of(address) is None:
            self._opened, self._offset = open_decompressed(address), begin
            if begin:
                self._opened.seek(begin - 1)
                last = self._opened.read(1)
        else:
            self._archive, self._offset = Decompressed(address, keep_positions=end is not None), 0
            for chunk in self._archive.chunks_before(begin):
                self._offset += len(chunk)
                last = chunk[-1:]
            self._opened = io.BufferedReader(self._archive, BLOCK_BYTES)
        if last not in (b"", b"\n"):
            self.skip_line()  # the rest of one that began before

    def __enter__(self) -> LineSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read_line(self, limit: int) -> bytes:
        """The next line, or its first `limit` bytes; empty at the end."""
        if self._end is not None and self._position(self._end) >= self._end:
            return b""
        return self._read(limit)

    def skip_line(self) -> None:
        """Skips the rest of a line."""
        while (rest := self._read(_SKIP_BYTES)) and not rest.endswith(b"\n"):
            pass

    def _position(self, end: int) -> int:
        """Where the next line begins; `end` at the end of an archive."""
        if self._archive is None:
            return self._offset
        return self._archive.position(self._offset) if self._opened.peek(1) else end  # type: ignore[attr-defined]

    def _read(self, limit: int) -> bytes:
        line = self._opened.readline(limit)
        self._offset += len(line)
        return line


def read_lines(file: InputFile, share: Share, convert: Convert) -> Generator[Document | Failure, None, int]:
    """convert(line number within the share, the line) for each line that begins in the share and is not blank.

    The line is None if it is too long. A leading byte order mark is removed. No line or document is held here while the
    caller uses it. Returns the number of lines. Raises DataError where the file cannot be read to its end, or begins as
    UTF-16 or a compressed file.
    """
    number, limit = 0, ReadOptions.max_line_bytes
    end = None if share.end in (-1, file.num_bytes) else share.end
    held: list[Document | Failure] = []
    with LineSource(file.address, share.begin, end) as lines:
        while line := lines.read_line(limit + 1):
            whole = len(line) <= limit or line.endswith(b"\n")
            if not whole:
                lines.skip_line()
            if number == 0 and share.begin == 0:
                line = without_mark(file, line)
            if line and not line.isspace():
                held.append(convert(number, line if whole else None))
            line = b""
            number += 1
            if held:
                yield held.pop()
    return number


def lines_before(file: InputFile, position: int) -> int:
    """How many lines of a file begin before a position. Raises DataError."""
    lines, last = 0, b""
    for chunk in _bytes_before(file, position):
        lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    return lines + (last not in (b"", b"\n"))  # the line that the position lies in


def _bytes_before(file: InputFile, position: int) -> Iterator[bytes]:
    if compression_of(file.address) is not None:
        with Decompressed(file.address) as archive:
            yield from archive.chunks_before(position)
        return
    with open_address(file.address) as opened:
        while position and (block := opened.read(min(position, BLOCK_BYTES))):
            position -= len(block)
            yield block


def without_mark(file: InputFile, data: bytes) -> bytes:
    """The beginning of a file without a byte order mark. Raises DataError for UTF-16, UTF-32 and compressed data."""
    if (compressed := begins_compressed(data)) is not None:
        raise DataError(f"{file.address}: {compressed}")
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise DataError(
            f"{file.address}: begins with the byte order mark of UTF-16 or UTF-32; convert the file to UTF-8"
        )
    return data.removeprefix(b"\xef\xbb\xbf")
