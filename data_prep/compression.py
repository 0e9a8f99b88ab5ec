"""Compressed input files as streams of bytes, in bounded memory: an archive that is cut off is an error, not the end of the file."""

from __future__ import annotations

import io
import zlib
from typing import IO, Any

from weftrain.core.errors import DataError
from weftrain.data_prep.files import BLOCK_BYTES, open_address

COMPRESSED = (".gz", ".zst")
BROKEN_ARCHIVE = (EOFError, OSError, zlib.error)  # what reading a damaged or truncated archive raises


def compression_of(name: str) -> str | None:
    """The suffix of a compressed file's name, or None."""
    return next((suffix for suffix in COMPRESSED if name.endswith(suffix)), None)


def plain_name(name: str) -> str:
    """A file's name without the suffix of its compression."""
    return name.removesuffix(compression_of(name) or "")


def open_decompressed(address: str) -> IO[bytes]:
    """The file's bytes, decompressed where its name says so; a damaged archive raises one of BROKEN_ARCHIVE. Raises DataError."""
    raw = open_address(address)
    if address.endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if address.endswith(".zst"):
        return io.BufferedReader(_Zstandard(raw), BLOCK_BYTES)
    return raw


class _Zstandard(io.RawIOBase):
    """Frame after frame, in bounded memory. The library's own stream reader takes a truncated frame for the end of the file."""

    _INPUT_BYTES = 8 << 10  # a frame's data is at most 32768 times as large

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError("reading .zst needs zstandard: pip install 'weftrain[data]'") from None
        self._raw, self._library = raw, zstandard
        self._frame: Any = None
        self._input, self._output, self._at = b"", b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._at == len(self._output):
            if not self._input:
                self._input = self._raw.read(self._INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the archive ends within a frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._output, self._at = self._frame.decompress(self._input), 0
            except self._library.ZstdError as error:
                raise OSError(f"damaged archive: {error}") from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output) - self._at)
        buffer[:count] = self._output[self._at : self._at + count]
        self._at += count
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
