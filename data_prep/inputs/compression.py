"""Compressed input files (`.gz`, `.bz2`, `.xz`, `.zst`, `.zstd`, of one or several frames) as streams in bounded
memory.

A truncated file, or other bytes after the last frame, is an error and never the end of the file. Each byte of the
stream has a position in the file: the start of the fixed-size block whose decompression yielded it. So positions depend
on the file alone, and a large file can be cut into shares by them.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from weftrain.core.errors import DataError
from weftrain.core.formats.units import gib
from weftrain.data_prep.inputs.files import BLOCK_BYTES, is_local, open_address

INPUT_BYTES = 1 << 16  # a block of the compressed file
_OUTPUT_BYTES = 1 << 20  # decompressed at once, where the library has a limit
_ZSTD_SLICE_BYTES = 1 << 10  # zstandard has none: a slice's data is at most 32,768 times as large
MAX_WINDOW_BYTES = 1 << 31  # zstd --long=31, and the dictionary of .xz: memory that the archive asks for


class BrokenArchive(DataError):  # noqa: N818 - as the library's EOFError is named
    """A compressed file that is damaged, truncated, or followed by something else. The message names it."""


@dataclass(frozen=True)
class _Format:
    """new: a decompressor of one frame, with decompress(data, limit), eof and unused_data. magic: start of a frame.
    padding: zero bytes may follow a frame. slice_bytes: given to the decompressor at once.
    """

    new: Callable[[], Any]
    magic: tuple[bytes, ...]
    errors: tuple[type[Exception], ...]
    padding: bool = True
    slice_bytes: int = INPUT_BYTES


def _new_zstandard() -> Any:
    library = _zstandard()
    return _ZstandardFrame(library.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj())


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise DataError("reading .zst needs zstandard: pip install 'weftrain[data]'") from None
    return zstandard


class _ZstandardFrame:
    """zstandard's decompressor with the signature of the standard library's."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def decompress(self, data: bytes, limit: int) -> bytes:
        try:
            result: bytes = self._frame.decompress(data)
        except _zstandard().ZstdError as error:
            raise OSError(str(error).removeprefix("zstd decompressor error: ")) from error
        return result

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data)


# and skippable frames
_ZSTD_MAGIC = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + kind]) + b"\x2a\x4d\x18" for kind in range(16)))
_FORMATS = {
    ".gz": _Format(lambda: zlib.decompressobj(wbits=31), (b"\x1f\x8b",), (zlib.error,)),
    ".bz2": _Format(bz2.BZ2Decompressor, (b"BZh",), (OSError,)),
    ".xz": _Format(
        lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW_BYTES), (b"\xfd7zXZ\x00",), (lzma.LZMAError,)
    ),
    ".zst": _Format(_new_zstandard, _ZSTD_MAGIC, (OSError,), padding=False, slice_bytes=_ZSTD_SLICE_BYTES),
}
_FORMATS[".zstd"] = _FORMATS[".zst"]
COMPRESSED = tuple(_FORMATS)
CUT = (".gz", ".zst", ".zstd")  # what is decompressed quickly enough that a later share may begin at the beginning


def compression_of(name: str) -> str | None:
    """The suffix of a compressed file's name in lower case, or None."""
    suffix = name[name.rfind(".") :].lower()
    return suffix if suffix in _FORMATS else None


def begins_compressed(head: bytes) -> str | None:
    """Problem and remedy for bytes that should be text but begin like a compressed file; None for others."""
    suffix = next((suffix for suffix, kind in _FORMATS.items() if head.startswith(kind.magic)), None)
    if suffix is None or head[:64].isascii():
        return None
    return f"begins as {suffix} files do; give its name that ending, or decompress it"


def plain_name(name: str) -> str:
    return name[: len(name) - len(compression_of(name) or "")]


def open_decompressed(address: str) -> IO[bytes]:
    """The file's bytes, decompressed by its suffix. Raises DataError; a read raises BrokenArchive or OSError."""
    if compression_of(address) is not None:
        return io.BufferedReader(Decompressed(address), BLOCK_BYTES)
    raw = open_address(address)
    return raw if is_local(address) else io.BufferedReader(raw, BLOCK_BYTES)  # type: ignore[type-var]


class Decompressed(io.RawIOBase):
    """The decompressed stream of an address. keep_positions: needed for `position`. Raises DataError at once; a read
    raises BrokenArchive, or OSError from the file itself.
    """

    def __init__(self, address: str, keep_positions: bool = False) -> None:
        suffix = compression_of(address)
        assert suffix is not None
        self._address, self._format = address, _FORMATS[suffix]
        if suffix in (".zst", ".zstd"):
            _zstandard()  # before the file is opened
        self._raw = open_address(address)
        self._frame: Any = None
        self._frames = 0  # whole ones so far
        self._fresh = False  # the frame has taken nothing yet
        self._input, self._taken = b"", 0  # a block, and how much of it the decompressor has taken
        self._block = 0  # where the block begins in the file
        self._more = False  # the decompressor holds output that it has not given
        self._output, self._at = b"", 0
        self._keep_positions = keep_positions
        self._decompressed = 0  # bytes of the stream so far
        # (end within the stream, begin in the file), from the last position asked for on
        self._blocks: deque[tuple[int, int]] = deque()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._at == len(self._output):
            self._output, self._at = self._next(), 0
        count = min(len(buffer), len(self._output) - self._at)
        buffer[:count] = memoryview(self._output)[self._at : self._at + count]
        self._at += count
        return count

    def position(self, offset: int) -> int:
        """The position of byte `offset` of the stream, which has been read. Offsets must not decrease between calls."""
        while self._blocks[0][0] <= offset:
            self._blocks.popleft()
        return self._blocks[0][1]

    def chunks_before(self, position: int) -> Iterator[bytes]:
        """Reads what lies before a position, in pieces; the next read continues there."""
        while data := self._next():
            if self._block >= position:
                self._output, self._at = data, 0
                return
            self._blocks.clear()
            yield data

    def _next(self) -> bytes:
        """The next piece of the stream; empty at its end."""
        while self._taken < len(self._input) or self._more or self._read_block():
            if self._frame is None:
                if self._format.padding and self._frames:
                    self._taken = len(self._input) - len(self._input[self._taken :].lstrip(b"\0"))
                    if self._taken == len(self._input):
                        continue
                self._frame, self._fresh = self._format.new(), True
            if data := self._decompress():
                self._decompressed += len(data)
                if self._keep_positions:
                    if self._blocks and self._blocks[-1][1] == self._block:
                        self._blocks.pop()
                    self._blocks.append((self._decompressed, self._block))
                return data
        return b""

    def _read_block(self) -> bool:
        """Whether the file has another block. Raises BrokenArchive where it ends within a frame."""
        self._block += len(self._input)
        pieces, left = [], INPUT_BYTES
        while left and (data := self._raw.read(left)):
            pieces.append(data)
            left -= len(data)
        self._input, self._taken = b"".join(pieces), 0
        if not pieces and (self._frame is not None or not self._frames):
            raise BrokenArchive(
                f"{self._address}: damaged or truncated: the archive ends too early, at byte {self._block:,}; copy it "
                "again"
            )
        return bool(pieces)

    def _decompress(self) -> bytes:
        """Feeds the decompressor. Raises BrokenArchive."""
        fed = self._input[self._taken : self._taken + self._format.slice_bytes]
        try:
            data: bytes = self._frame.decompress(fed, _OUTPUT_BYTES)
        except self._format.errors as error:
            raise BrokenArchive(f"{self._address}: {self._problem(error)}") from error
        if self._frame.eof:
            unused, self._more = len(self._frame.unused_data), False
            self._frame, self._frames = None, self._frames + 1
        else:
            unused, self._more = len(getattr(self._frame, "unconsumed_tail", b"")), len(data) == _OUTPUT_BYTES
        self._taken += len(fed) - unused
        self._fresh = False
        return data

    def _problem(self, error: Exception) -> str:
        place = f"byte {self._block + self._taken:,}"
        if "memory" in str(error).lower():
            return (
                f"needs a window of more than {gib(MAX_WINDOW_BYTES)} to be decompressed; compress it again with "
                "a smaller one"
            )
        if self._fresh and self._frames and not self._input.startswith(self._format.magic, self._taken):
            return f"something else follows the end of the archive, at {place}; copy it again, or cut it off there"
        return f"damaged or truncated: {error}, near {place}; copy it again"

    def close(self) -> None:
        self._raw.close()
        super().close()
