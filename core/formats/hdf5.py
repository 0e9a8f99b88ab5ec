"""HDF5 read without trust: only datasets and attributes in the file itself, of the expected type and size.

What a reader would get wrong: opening and indexing with h5py is not safe. It follows external links and external
storage out of the file, reads zeros for a virtual dataset without its source, and believes a 1,400-byte file that
declares 2 TiB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5l, h5s, h5t, h5z

# what h5py raises for damaged and hostile files
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
_TYPES = {
    "<u2": h5t.STD_U16LE,
    "<i4": h5t.STD_I32LE,
    "<u4": h5t.STD_U32LE,
    "<i8": h5t.STD_I64LE,
    "|u1": h5t.STD_U8LE,
    "<f4": h5t.IEEE_F32LE,
    "<f8": h5t.IEEE_F64LE,
}
_MAX_CHUNK_BYTES = 64 << 20
_GZIP_MAX_RATIO = 1040  # deflate cannot reach more than 1032


class UntrustedFileError(Exception):
    """field: the dataset or attribute. problem: what is wrong with it; it follows the name in messages."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


def read_attributes(file: h5py.File, integers: tuple[str, ...], strings: Mapping[str, int]) -> dict[str, Any]:
    """The root's attributes, which must be exactly these: scalar int64, and fixed-length strings (name -> most bytes).

    Raises UntrustedFileError, or one of HDF5_ERRORS.
    """
    found = {h5a.open(file.id, index=index).name.decode() for index in range(h5a.get_num_attrs(file.id))}
    if found != {*integers, *strings}:
        raise UntrustedFileError("attributes", f"are {sorted(found)[:12]}, not {sorted([*integers, *strings])}")
    result: dict[str, Any] = {}
    for name in found:
        attribute = h5a.open(file.id, name.encode())
        kind = attribute.get_type()
        if attribute.get_space().get_simple_extent_type() != h5s.SCALAR:
            raise UntrustedFileError(name, "is not a scalar attribute")
        if name in integers:
            if kind != h5t.STD_I64LE:
                raise UntrustedFileError(name, "is not a 64-bit integer attribute")
        elif not isinstance(kind, h5t.TypeStringID) or kind.is_variable_str() or kind.get_size() > strings[name]:
            raise UntrustedFileError(name, f"is not a fixed-length string attribute of at most {strings[name]} bytes")
        value = file.attrs[name]
        result[name] = int(value) if name in integers else bytes(value).decode()
    return result


def open_dataset(file: h5py.File, name: str, dtype: np.dtype[Any], rank: int, file_bytes: int) -> h5py.Dataset:
    """A dataset of the root: contiguous or chunked (at most gzip), of that type and rank, no larger than the file.

    Raises UntrustedFileError, or one of HDF5_ERRORS.
    """
    if file.id.links.get_info(name.encode()).type != h5l.TYPE_HARD:
        raise UntrustedFileError(name, "is a soft or external link; links are not followed")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise UntrustedFileError(name, "is not a dataset")
    plist = dataset.id.get_create_plist()
    if plist.get_layout() not in (h5d.CONTIGUOUS, h5d.CHUNKED) or plist.get_external_count():
        raise UntrustedFileError(
            name, "is a virtual, compact or externally stored dataset; only contiguous and chunked ones are read"
        )
    if dataset.id.get_type() != _TYPES[dtype.str]:
        raise UntrustedFileError(name, f"has type {dataset.dtype}, not {dtype}")
    if dataset.id.get_space().get_simple_extent_type() != h5s.SIMPLE or dataset.ndim != rank:
        raise UntrustedFileError(name, f"has rank {dataset.ndim}, not {rank}")
    if problem := _impossible_size(dataset, file_bytes):
        raise UntrustedFileError(name, problem)
    return dataset


def _impossible_size(dataset: h5py.Dataset, file_bytes: int) -> str | None:
    """What is wrong with a dataset that the file cannot hold, or None."""
    declared = dataset.dtype.itemsize * math.prod(map(int, dataset.shape))
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        if declared and (offset is None or offset + declared > file_bytes):
            return (
                f"declares {declared:,} bytes at offset {offset}, the file has {file_bytes:,}: it is truncated or lies"
            )
        return None
    plist = dataset.id.get_create_plist()
    filters = {plist.get_filter(index)[0] for index in range(plist.get_nfilters())}
    if not filters <= {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE}:
        return "uses a filter other than gzip and shuffle"
    ratio = _GZIP_MAX_RATIO if h5z.FILTER_DEFLATE in filters else 1
    chunk_bytes = dataset.dtype.itemsize * math.prod(map(int, dataset.chunks))
    stored = min(dataset.id.get_storage_size(), file_bytes)
    if chunk_bytes > _MAX_CHUNK_BYTES or declared > stored * ratio:
        return (
            f"declares {declared:,} bytes in chunks of {chunk_bytes:,}, the file stores {stored:,}: it is truncated or "
            "lies"
        )
    return None
