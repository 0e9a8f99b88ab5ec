"""The bytes of a shard's `data`, `loss_mask` and `doc_end`, to be sliced: of the mapped file, or through h5py where the
dataset is chunked.

Slices of a mapped file are memoryviews, which copy nothing, so that many rows are gathered by one `bytes.join`.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from weftrain.core.errors import one_line
from weftrain.core.formats.hdf5 import HDF5_ERRORS
from weftrain.core.formats.shard_file import Identity, identity_of, refusal

MAX_MAPPED = 256


class MappedStreams:
    """Streams that lie contiguously in their file, which is mapped when it is read; at most MAX_MAPPED files are at
    once.

    A mapping lives as long as something holds its views: `_mapping`, which keeps the latest, or a reader in the middle
    of its work.
    """

    access = "mapped"

    def __init__(self, path: Path, identity: Identity, streams: dict[str, h5py.Dataset]) -> None:
        self._path, self._identity = path, identity
        self._places = tuple((name, int(stream.id.get_offset()), stream.nbytes) for name, stream in streams.items())
        self._views: Callable[[], _Views | None] = _no_views  # a weak reference, once the file was mapped

    def __getitem__(self, name: str) -> memoryview:
        """A stream's bytes. Raises DataError where the file cannot be mapped, or is another than was opened."""
        views = self._views()
        if views is None:
            try:
                views = _mapping(self._path, self._identity, self._places)
            except (OSError, ValueError) as error:
                raise refusal(self._path, "file", f"cannot be mapped: {one_line(error)}") from error
            self._views = weakref.ref(views)
        return views[name]

    def close(self) -> None:
        """Nothing is open."""


class _Views(dict[str, memoryview]):
    """A mapped file's streams by name. A class of its own, since a dict cannot be referred to weakly."""


def _no_views() -> None:
    return None


@lru_cache(maxsize=MAX_MAPPED)
def _mapping(path: Path, identity: Identity, places: tuple[tuple[str, int, int], ...]) -> _Views:
    """The file, mapped read-only. Cached, and so bounded in number, because each mapping holds a file descriptor."""
    with open(path, "rb") as file:
        if identity_of(os.fstat(file.fileno())) != identity:
            raise ValueError("the file changed since it was opened")
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return _Views((name, whole[offset : offset + num_bytes]) for name, offset, num_bytes in places)


class ChunkedStreams:
    """Streams of which one is chunked, perhaps compressed: read through h5py from a file that stays open."""

    def __init__(self, path: Path, file: h5py.File, streams: dict[str, h5py.Dataset]) -> None:
        self._file: h5py.File = file
        self._streams = {name: ChunkedStream(path, stream) for name, stream in streams.items()}
        chunked = next(stream for stream in streams.values() if stream.chunks is not None)
        self.access = f"h5py ('{chunked.name[1:]}' is chunked, compression {chunked.compression or 'none'})"

    def __getitem__(self, name: str) -> ChunkedStream:
        return self._streams[name]

    def close(self) -> None:
        self._file.close()


class ChunkedStream:
    """An HDF5 dataset, sliced by bytes as a memoryview is."""

    def __init__(self, path: Path, stream: h5py.Dataset) -> None:
        self._path, self._name, self._stream = path, stream.name[1:], stream
        self._itemsize = stream.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        """Raises DataError where the library cannot read them."""
        start, stop = part.start // self._itemsize, part.stop // self._itemsize
        try:
            return np.ascontiguousarray(self._stream[start:stop])
        except HDF5_ERRORS as error:
            raise refusal(
                self._path, self._name, f"positions {start}..{stop} cannot be read: {one_line(error)}"
            ) from error


Streams = MappedStreams | ChunkedStreams


def streams_of(path: Path, file: h5py.File, identity: Identity, streams: dict[str, h5py.Dataset]) -> Streams:
    """Closes `file` where it need not stay open."""
    if any(stream.chunks is not None for stream in streams.values()):
        return ChunkedStreams(path, file, streams)
    mapped = MappedStreams(path, identity, streams)
    file.close()
    return mapped
