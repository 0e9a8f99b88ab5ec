"""Files whose bytes lie in an object store, read by ranges where a local file is opened.

A *stand-in* is a sparse local file of the same name and size that begins with MAGIC and a token. While `bytes_of` is
asked for that token, `open_plain` (core/formats/plain_file.py) gives a file that fetches what is read. So a folder with
stand-ins is read by everything that reads a folder, and only the bytes that are asked for travel. Without the process
that made it a stand-in is refused, by every reader that opens files as untrusted ones.

What a reader would get wrong: a library that opens a stand-in by itself reads zeros. So only files that this program
reads through `open_plain`, and whose bytes a hash covers, have one.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path

Read = Callable[[int, int], bytes]  # the bytes from one place up to another

MAGIC = b"weftrain: the bytes of this file lie elsewhere; open the run by its address\n"
_TOKEN_BYTES = 32
HEAD_BYTES = len(MAGIC) + _TOKEN_BYTES
MIN_BYTES = 4096  # a smaller file is fetched
_FIRST_BYTES, _MOST_BYTES = 256 << 10, 16 << 20  # of one request: it doubles while a file is read on

_READS: dict[bytes, Read] = {}


def new_token() -> bytes:
    """A token for a stand-in, whose first bytes are `MAGIC + token`."""
    return secrets.token_hex(_TOKEN_BYTES // 2).encode()


def serve(token: bytes, read: Read) -> None:
    """From now on, opening the stand-in of this token reads by `read`."""
    _READS[token] = read


def forget(token: bytes) -> None:
    _READS.pop(token, None)


def token_at(descriptor: int) -> bytes | None:
    """The token of an open file, if it is a stand-in."""
    head = os.pread(descriptor, HEAD_BYTES, 0)
    return head[len(MAGIC) :] if head.startswith(MAGIC) and len(head) == HEAD_BYTES else None


def token_of(path: Path) -> bytes | None:
    """The token of a plain file, if it is a stand-in; None also for what is no plain file. Raises OSError."""
    if not path.is_file() or path.is_symlink():
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return token_at(descriptor)
    finally:
        os.close(descriptor)


def bytes_of(token: bytes) -> Read | None:
    return _READS.get(token)


class DistantFile(io.RawIOBase):
    """An open file whose bytes `read` fetches. descriptor: of its stand-in, which this object closes."""

    def __init__(self, descriptor: int, read: Read) -> None:
        self._descriptor, self._read, self._at = descriptor, read, 0
        self._size = os.fstat(descriptor).st_size
        self._block, self._block_at, self._ask = b"", 0, _FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        """The stand-in's descriptor, whose size is the file's."""
        return self._descriptor

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        memory = memoryview(buffer).cast("B")
        count = max(0, min(len(memory), self._size - self._at))
        done = 0
        while done < count:
            inside = self._at - self._block_at
            if not 0 <= inside < len(self._block):
                self._fetch(count - done)
                inside = 0
            part = memoryview(self._block)[inside : inside + count - done]
            memory[done : done + len(part)] = part
            done, self._at = done + len(part), self._at + len(part)
        return done

    def _fetch(self, wanted: int) -> None:
        follows = bool(self._block) and self._at == self._block_at + len(self._block)
        self._ask = min(2 * self._ask, _MOST_BYTES) if follows else _FIRST_BYTES
        stop = min(self._size, self._at + max(self._ask, min(wanted, _MOST_BYTES)))
        self._block, self._block_at = self._read(self._at, stop), self._at
        if len(self._block) != stop - self._at:
            raise OSError(f"{len(self._block):,} bytes came of the {stop - self._at:,} from byte {self._at:,} on")

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
            self._block = b""
        super().close()
