"""Opening a shard without trust: everything but the tokens is checked. core/formats/shard_reader.py reads those."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from weftrain.core.errors import DataError, one_line
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.hdf5 import HDF5_ERRORS, UntrustedFileError, open_dataset, read_attributes
from weftrain.core.formats.shard_format import (
    BLOCK_BYTES,
    FIM,
    FORMAT,
    FORMAT_2,
    FORMAT_4,
    INTEGERS,
    INTEGERS_2,
    LOSS_MASK,
    OPTIONAL,
    PADDING,
    PLANES,
    STRINGS,
    STRINGS_2,
    TABLES,
    TOKEN_WEIGHTS,
    Documents,
    FimRecord,
    contradiction,
    shard_digest,
    token_dtype,
)


class Identity(NamedTuple):
    """Distinguishes a file from another that replaces it."""

    device: int
    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True)
class OpenShard:
    """A shard of which everything is checked but the contents of `streams`: 'data' and the planes that it has."""

    file: h5py.File
    identity: Identity
    header: dict[str, Any]
    documents: Documents
    source_names: tuple[str, ...] | None
    block_digest: np.ndarray
    streams: dict[str, h5py.Dataset]


def open_shard(path: Path) -> OpenShard:
    """Open a shard's HDF5 file and check everything but the tokens. Raises DataError."""
    if not path.is_file():
        raise refusal(path, "file", "is not a regular file" if path.exists() else "is missing")
    file: h5py.File | None = None
    try:
        identity = identity_of(os.stat(path))
        file = h5py.File(path, "r", locking=False)
        return _checked(file, identity)
    except UntrustedFileError as error:
        refused = refusal(path, error.field, error.problem)
    except HDF5_ERRORS as error:
        refused = refusal(path, "file", f"cannot be read as HDF5: {one_line(error)}")
    if file is not None:
        file.close()
    raise refused


def _checked(file: h5py.File, identity: Identity) -> OpenShard:
    """Raises UntrustedFileError, or one of HDF5_ERRORS."""
    if file.userblock_size:
        raise UntrustedFileError("file", "has an HDF5 user block")
    if "data" not in file:
        raise UntrustedFileError("file", f"holds {sorted(file)[:8]}, no 'data'; is it a weftrain shard?")
    header = _header(file)
    links, required = set(file), {"data", *TABLES}
    if not required <= links <= required | OPTIONAL:
        raise UntrustedFileError("file", f"holds {sorted(links)[:12]}, not {sorted(required)}; is it a weftrain shard?")
    tables = {name: open_dataset(file, name, dtype, rank, identity.size)[...] for name, (dtype, rank) in TABLES.items()}
    fim = None
    if FIM in links:
        tables[FIM] = open_dataset(file, FIM, np.dtype("<i4"), 2, identity.size)[...]
        if tables[FIM].shape[1] != 3:
            raise UntrustedFileError(FIM, f"has shape {tables[FIM].shape}, not [n, 3]")
        fim = FimRecord(tables[FIM][:, 0], tables[FIM][:, 1:])
    names, num_sources, source = _sources(header, tables["doc_source"])
    documents = Documents(
        tables["doc_end"], tables["doc_id"], source, num_sources, tables["doc_file"], tables["doc_record"], fim
    )
    data = open_dataset(file, "data", token_dtype(header["vocab_size"]), 1, identity.size)
    streams = {"data": data}
    for name, plane in PLANES.items():
        if name in links:
            streams[name] = open_dataset(file, name, plane.stored, 1, identity.size)
    if problem := contradiction(header, data.shape[0], documents):
        raise UntrustedFileError(*problem)
    for name, stream in streams.items():
        if stream.shape != data.shape:
            raise UntrustedFileError(name, f"has shape {stream.shape}, 'data' has {data.shape}")
    digests = (-(-data.shape[0] * data.dtype.itemsize // BLOCK_BYTES), 32)
    if tables["block_digest"].shape != digests:
        raise UntrustedFileError("block_digest", f"has shape {tables['block_digest'].shape}, not {digests}")
    if shard_digest(header, tables, LOSS_MASK in links) != header["digest"]:
        raise UntrustedFileError("digest", "attributes or tables do not hash to it, so the file was altered or damaged")
    return OpenShard(file, identity, header, documents, names, tables["block_digest"], streams)


def _header(file: h5py.File) -> dict[str, Any]:
    """The attributes, of format 4, 3 or 2. Raises UntrustedFileError."""
    former = "sources" in file.attrs
    header = read_attributes(file, INTEGERS_2, STRINGS_2) if former else read_attributes(file, INTEGERS, STRINGS)
    latest = FORMAT_4 if TOKEN_WEIGHTS in file else FORMAT
    if header["format"].encode() != (FORMAT_2 if former else latest):
        known = ", ".join(repr(name.decode()) for name in (FORMAT_4, FORMAT, FORMAT_2))
        raise UntrustedFileError(
            "format", f"is {header['format']!r}, which these contents do not belong to; this program reads {known}"
        )
    return header


def _sources(header: dict[str, Any], source: np.ndarray) -> tuple[tuple[str, ...] | None, int, np.ndarray]:
    """The source names of a shard of format 2, the number of sources, and `doc_source` with -1 for padding."""
    if "sources" not in header:
        return None, header["num_sources"], source
    try:
        names = parse_json(header["sources"].encode())
    except ValueError as error:
        raise UntrustedFileError("sources", f"is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UntrustedFileError("sources", "is not a JSON list of strings")
    if source.size and (source.min() < 0 or source.max() >= len(names)):
        raise UntrustedFileError("doc_source", f"an index lies outside the {len(names)} sources")
    if names[-1:] == [PADDING]:
        names.pop()
    return tuple(names), len(names), np.where(source == len(names), np.int32(-1), source)


def refusal(path: Path, field: str, problem: str) -> DataError:
    return DataError(f"{path}: {field}: {problem}; remove the dataset and prepare it again")


def identity_of(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


MAX_MAPPED = 256


class MappedStreams:
    """Streams stored contiguously: their file is mapped when it is read, at most MAX_MAPPED files at once.

    A mapping lives as long as its views are referenced: by the cache of `_mapping`, or by a read in progress.
    """

    access = "mapped"

    def __init__(self, path: Path, identity: Identity, streams: dict[str, h5py.Dataset]) -> None:
        self._path, self._identity = path, identity
        self._places = tuple((name, int(stream.id.get_offset()), stream.nbytes) for name, stream in streams.items())
        self._views: Callable[[], _Views | None] = _no_views  # a weak reference, once the file was mapped

    def __getitem__(self, name: str) -> memoryview:
        """A stream's bytes. Raises DataError if the file cannot be mapped or has been replaced."""
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
    """A mapped file's streams by name. A subclass because a plain dict takes no weak reference."""


def _no_views() -> None:
    return None


@lru_cache(maxsize=MAX_MAPPED)
def _mapping(path: Path, identity: Identity, places: tuple[tuple[str, int, int], ...]) -> _Views:
    """The file, mapped read-only. The cache bounds their number, since each mapping holds a file descriptor."""
    with open(path, "rb") as file:
        if identity_of(os.fstat(file.fileno())) != identity:
            raise ValueError("the file changed since it was opened")
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return _Views((name, whole[offset : offset + num_bytes]) for name, offset, num_bytes in places)


class ChunkedStreams:
    """Streams of which at least one is chunked: read through h5py from a file that stays open."""

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
    """An HDF5 dataset, sliced by byte offsets as a memoryview is."""

    def __init__(self, path: Path, stream: h5py.Dataset) -> None:
        self._path, self._name, self._stream = path, stream.name[1:], stream
        self._itemsize = stream.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        """Raises DataError."""
        start, stop = part.start // self._itemsize, part.stop // self._itemsize
        try:
            return np.ascontiguousarray(self._stream[start:stop])
        except HDF5_ERRORS as error:
            raise refusal(
                self._path, self._name, f"positions {start}..{stop} cannot be read: {one_line(error)}"
            ) from error


Streams = MappedStreams | ChunkedStreams


def streams_of(path: Path, file: h5py.File, identity: Identity, streams: dict[str, h5py.Dataset]) -> Streams:
    """How to read the streams; closes `file` unless it is needed."""
    if any(stream.chunks is not None for stream in streams.values()):
        return ChunkedStreams(path, file, streams)
    mapped = MappedStreams(path, identity, streams)
    file.close()
    return mapped
