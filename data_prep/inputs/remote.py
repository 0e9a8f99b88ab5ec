"""File systems behind fsspec, with one kind of error.

The libraries behind fsspec have exceptions of their own, such as botocore's, which would pass every handler of OSError.
Whatever a method of a file system or open file raises leaves this module as an OSError.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import IO, Any

from weftrain.core.errors import one_line

_BUFFER_BYTES = 1 << 20


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {one_line(error)}") from error


class RemoteSystem:
    """An fsspec file system with its methods; `open` gives a buffered file for reading bytes."""

    def __init__(self, system: Any) -> None:
        self._system = system

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._system, name)
        return functools.partial(_called, value) if callable(value) else value

    def open(self, path: str) -> IO[bytes]:
        with _os_errors():
            return io.BufferedReader(_RemoteFile(self._system.open(path, "rb")), _BUFFER_BYTES)

    def size_now(self, path: str) -> int:
        """The file's current size on the server; fsspec caches listings and the sizes in them. Raises OSError."""
        with _os_errors():
            self._system.invalidate_cache(path)
            return int(self._system.size(path))


def _called(method: Any, *arguments: Any, **named: Any) -> Any:
    with _os_errors():
        return method(*arguments, **named)


class _RemoteFile(io.RawIOBase):
    """An open file of fsspec."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        with _os_errors():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _os_errors():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()
