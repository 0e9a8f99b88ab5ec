"""The files that stages hand on: named numpy arrays and a JSON note in one file, written atomically, read in slices.

They belong to the work folder, are made and read by the same program, and are removed at the end. Layout: the header's
length (8 bytes, little-endian), the header (JSON: the note, and each array's type, shape and offset), the arrays.
Slices are read, not mapped, so a process holds only what it asked for.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json

_ALIGNMENT = 64


def damaged(path: Path, error: Exception, work: Path) -> DataError:
    """The error for a file of the work folder `work` that cannot be read."""
    return DataError(f"{path}: cannot be read: {error}; remove {work} and prepare again")


def write_table(path: Path, arrays: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> None:
    """Write atomically; equal arguments give equal bytes. Contiguous arrays are not copied. Raises OSError."""
    ready = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    places, end = {}, 0
    for name, array in ready.items():
        places[name] = [_description(array.dtype), list(array.shape), end]
        end = _aligned(end + array.nbytes)
    header = canonical_json({"arrays": places, "note": note})
    fsops.write_blocks(path, _blocks(header, ready))


def _blocks(header: bytes, arrays: Mapping[str, np.ndarray]) -> Iterator[memoryview | bytes]:
    start = 8 + len(header)
    yield len(header).to_bytes(8, "little") + header + bytes(_aligned(start) - start)
    for array in arrays.values():
        if array.size:
            yield array.reshape(-1).view(np.uint8).data
            yield bytes(_aligned(array.nbytes) - array.nbytes)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _description(dtype: np.dtype[Any]) -> Any:
    return dtype.str if dtype.names is None else [list(field) for field in dtype.descr]


def _dtype(description: Any) -> np.dtype[Any]:
    if isinstance(description, str):
        return np.dtype(description)
    return np.dtype([(name, kind, *(tuple(size) for size in shape)) for name, kind, *shape in description])


class Table:
    """A file made by `write_table`, open until the object is collected. Raises DataError naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._close = weakref.finalize(self, os.close, self._descriptor)
            length = int.from_bytes(self._read(8, 0), "little")
            if length > os.fstat(self._descriptor).st_size:
                raise ValueError("ends within its header")
            header = parse_json(self._read(length, 8))
            self.note: dict[str, Any] = header["note"]
            self._start = _aligned(8 + length)
            self._arrays = {
                name: (_dtype(kind), tuple(shape), offset) for name, (kind, shape, offset) in header["arrays"].items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def __getitem__(self, name: str) -> np.ndarray:
        return self.slice(name, 0, self.length(name))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    @property
    def num_bytes(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape, _ in self._arrays.values())

    def length(self, name: str) -> int:
        """Along the first axis."""
        return int(self._arrays[name][1][0])

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._arrays[name][0]

    def slice(self, name: str, start: int, stop: int) -> np.ndarray:
        """array[start:stop] along the first axis, reading no more; 0 <= start, stop <= length. Raises DataError."""
        dtype, (_, *inner), _ = self._arrays[name]
        array = np.empty((max(0, stop - start), *inner), dtype)
        self.read_into(array, name, start)
        return array

    def read_into(self, array: np.ndarray, name: str, start: int) -> None:
        """Fill a contiguous array of the same type from `start` on. Raises DataError."""
        dtype, (length, *_), offset = self._arrays[name]
        if array.dtype != dtype or not 0 <= start <= start + len(array) <= length:
            raise IndexError(f"{self.path}: {name}[{start}:{start + len(array)}] of {length}, {dtype}")
        if array.size:
            try:
                self._fill(
                    array.reshape(-1).view(np.uint8).data, self._start + offset + start * (array.nbytes // len(array))
                )
            except OSError as error:
                raise self._damaged(error) from error

    def _read(self, length: int, offset: int) -> bytes:
        data = bytearray(length)
        self._fill(memoryview(data), offset)
        return bytes(data)

    def _fill(self, memory: memoryview, offset: int) -> None:
        while memory:
            count = os.preadv(self._descriptor, [memory], offset)
            if not count:
                raise OSError("ends too early")
            memory, offset = memory[count:], offset + count

    def _damaged(self, error: Exception) -> DataError:
        return damaged(self.path, error, self.path.parent.parent)
