"""Opening a shard's HDF5 file without trust: everything in it but the tokens is checked. core/formats/shard_reader.py
reads those.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
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
    INTEGERS,
    INTEGERS_2,
    OPTIONAL,
    PADDING,
    STRINGS,
    STRINGS_2,
    TABLES,
    Documents,
    FimRecord,
    contradiction,
    shard_digest,
    token_dtype,
)


class Identity(NamedTuple):
    """What tells a file from another put in its place."""

    device: int
    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True)
class OpenShard:
    """What `open_shard` has checked: all but the contents of `streams`, 'data' and perhaps 'loss_mask'."""

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
    if "loss_mask" in links:
        streams["loss_mask"] = open_dataset(file, "loss_mask", np.dtype(np.uint8), 1, identity.size)
    if problem := contradiction(header, data.shape[0], documents):
        raise UntrustedFileError(*problem)
    if any(stream.shape != data.shape for stream in streams.values()):
        raise UntrustedFileError("loss_mask", f"has shape {streams['loss_mask'].shape}, 'data' has {data.shape}")
    digests = (-(-data.shape[0] * data.dtype.itemsize // BLOCK_BYTES), 32)
    if tables["block_digest"].shape != digests:
        raise UntrustedFileError("block_digest", f"has shape {tables['block_digest'].shape}, not {digests}")
    if shard_digest(header, tables, "loss_mask" in links) != header["digest"]:
        raise UntrustedFileError("digest", "attributes or tables do not hash to it, so the file was altered or damaged")
    return OpenShard(file, identity, header, documents, names, tables["block_digest"], streams)


def _header(file: h5py.File) -> dict[str, Any]:
    """The attributes, of format 3 or 2. Raises UntrustedFileError."""
    former = "sources" in file.attrs
    header = read_attributes(file, INTEGERS_2, STRINGS_2) if former else read_attributes(file, INTEGERS, STRINGS)
    if header["format"].encode() != (FORMAT_2 if former else FORMAT):
        known = f"{FORMAT.decode()!r} and {FORMAT_2.decode()!r}"
        raise UntrustedFileError(
            "format", f"is {header['format']!r}, which these attributes do not belong to; this program reads {known}"
        )
    return header


def _sources(header: dict[str, Any], source: np.ndarray) -> tuple[tuple[str, ...] | None, int, np.ndarray]:
    """The names of a shard of format 2, how many sources there are, and `doc_source` as format 3 has it: -1 for
    padding.
    """
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
