"""MosaicML Streaming's MDS: shards `.mds` of ids or text, optionally compressed; each shard states its own columns.

A shard is the number of samples (uint32), the starts of the samples and the end of the last (uint32), its columns as
JSON, and the samples: the sizes of columns without a fixed one, and the columns. Only the requested column is decoded,
never a pickled one. `index.json` only serves to see that no shard is missing.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import PurePosixPath
from typing import IO

import numpy as np

from weftrain.core.errors import DataError, file_problem
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.safe_names import checked_path
from weftrain.data_prep.inputs.compression import compression_of, open_decompressed
from weftrain.data_prep.inputs.files import exists, open_address
from weftrain.data_prep.readers.contract import Probe, Reader, Records
from weftrain.data_prep.readers.documents import InputFile, Share
from weftrain.data_prep.readers.ids import ids_of_bytes, ids_of_list, read_stream
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.sample_table import (
    SampleColumn,
    SampleTable,
    check_lengths_differ,
    ids_documents,
    read_count,
    read_starts,
    text_documents,
    tokens_column,
)

_SUFFIX = ".mds"
_MAX_COLUMNS_BYTES, _MAX_INDEX_BYTES = 1 << 20, 64 << 20
_UNSUPPORTED = (".br", ".snappy")
# of an ndarray without a fixed type
_VALUES = {8: "<u1", 9: "<i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_NAMES = {np.dtype(dtype).name: dtype for dtype in _VALUES.values()}


def _holds_ids(column: SampleColumn) -> bool:
    """Whether the encoding alone says that a column holds integers."""
    kind, _, rest = column.encoding.partition(":")
    return kind == "ndarray" and (not rest or rest.partition(":")[0] in _NAMES)


def _may_hold_ids(column: SampleColumn) -> bool:
    return _holds_ids(column) or column.encoding in ("bytes", "json")


def _open_shard(address: str, opened: IO[bytes], num_bytes: int | None) -> SampleTable:
    """The head of a shard; `opened` is left at the samples. num_bytes: if not compressed. Raises DataError."""
    starts = read_starts(opened, address, num_bytes)
    config_bytes = int(starts[0]) - 4 - 4 * len(starts)
    if not 0 < config_bytes <= _MAX_COLUMNS_BYTES:
        raise DataError(f"{address}: its first sample does not lie after its head; copy it again")
    columns = _columns(address, read_stream(opened, address, config_bytes))
    return SampleTable(address, starts, columns, compression_of(address) is None)


def _columns(name: str, data: bytes) -> tuple[SampleColumn, ...]:
    try:
        tree = parse_json(data)
        if not isinstance(tree, dict) or (tree.get("version"), tree.get("format")) != (2, "mds"):
            raise ValueError("is not of version 2 of MDS")
        names, encodings, sizes = (tree.get(f"column_{key}") for key in ("names", "encodings", "sizes"))
        if not (isinstance(names, list) and isinstance(encodings, list) and isinstance(sizes, list)):
            raise ValueError("names no columns")
        if not all(isinstance(item, str) for item in [*names, *encodings]) or len(set(names)) < len(names):
            raise ValueError("has columns without a name, or two of one")
        if not all(size is None or (type(size) is int and 0 < size < 1 << 32) for size in sizes):
            raise ValueError("has a column whose size is none")
        return tuple(SampleColumn(*column) for column in zip(names, encodings, sizes, strict=True))
    except ValueError as error:
        raise DataError(f"{name}: its head cannot be read: {error}; copy it again") from error


def _documents(as_rows: bool, index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    with open_decompressed(file.address) as opened:
        shard = _open_shard(file.address, opened, _plain_bytes(file))
        column = tokens_column(shard, options, _holds_ids, _may_hold_ids)
        decode = partial(_decode, column.encoding, options)
        return (
            yield from ids_documents(opened, shard, column, decode, index, file, share, options if as_rows else None)
        )


def mds_text(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """One document per sample: the column options.text_key, of encoding str."""
    with open_decompressed(file.address) as opened:
        shard = _open_shard(file.address, opened, _plain_bytes(file))
        return (yield from text_documents(opened, shard, options.text_key, index, file, share, options))


def _decode(encoding: str, options: ReadOptions, data: bytes) -> np.ndarray | str:
    """The ids of a column, integers [n], or what is wrong with it."""
    if encoding == "json":
        return ids_of_list(data)
    return ids_of_bytes(data, options) if encoding == "bytes" else _array(encoding, data)


def _array(encoding: str, data: bytes) -> np.ndarray | str:
    """An `ndarray[:type[:shape]]`; bytes for type and shape precede the values unless the encoding fixes them."""
    _, _, rest = encoding.partition(":")
    name, _, shape_said = rest.partition(":")
    at = 0
    if not name:
        name, at = np.dtype(_VALUES.get(data[0] if data else 0, "<f4")).name, 1
    if name not in _NAMES:
        return f"is an array of {name}, not of integers"
    dtype, dimensions, count = np.dtype(_NAMES[name]), 1, (len(data) - at) // np.dtype(_NAMES[name]).itemsize
    if shape_said:
        dimensions, count = (
            shape_said.count(",") + 1,
            int(shape_said) if re.fullmatch("[0-9]{1,12}", shape_said) else -1,
        )
    elif len(data) <= at:
        return "is an array that ends before its shape"
    else:
        width, dimensions = 1 << (data[at] & 3), data[at] >> 2
        count = int.from_bytes(data[at + 1 : at + 1 + width], "little")
        at += 1 + width * dimensions
    if dimensions != 1 or len(data) - at != count * dtype.itemsize:
        return (
            f"is an array of {dimensions} dimensions, the first of {count:,}, in {len(data):,} bytes; one dimension of "
            f"{name} is read"
        )
    return np.frombuffer(data, dtype, offset=at)


def _plain_bytes(file: InputFile) -> int | None:
    return None if compression_of(file.address) is not None else file.num_bytes


def _num_samples(file: InputFile) -> int:
    """Samples; 1 for a compressed shard, which is not cut. Raises DataError."""
    if compression_of(file.address) is not None:
        return 1
    with open_decompressed(file.address) as opened:
        return read_count(opened, file.address)


def _kind(probe: Probe) -> str | None:
    """'mds', 'mds_rows', 'mds_text' or None. Raises DataError for an ambiguous one."""
    if probe.plain_name.endswith(tuple(_SUFFIX + suffix for suffix in _UNSUPPORTED)):
        raise DataError(
            f"{probe.address}: is compressed as {PurePosixPath(probe.name).suffix}; decompress it, or write the shards "
            "with zstd"
        )
    if not probe.plain_name.endswith(_SUFFIX):
        return None
    with open_decompressed(probe.address) as opened:
        shard = _open_shard(probe.address, opened, None)
        usual = [column.name for column in shard.columns if column.name in ("tokens", "input_ids")]
        ids = usual or [column.name for column in shard.columns if _holds_ids(column)]
        if ids and any(column.encoding == "str" and column.name == "text" for column in shard.columns):
            raise DataError(f"{probe.address}: holds text and ids: say which with --format mds_text or --format mds")
        if not ids:
            return "mds_text" if any(column.encoding == "str" for column in shard.columns) else "mds"
        if len(ids) == 1:
            check_lengths_differ(opened, shard, ids[0], "mds")
        return "mds"


def _belongs(probe: Probe) -> bool:
    """Whether a file is the index of shards. Raises DataError where a shard is missing or exists twice."""
    if compression_of(probe.name) is not None and probe.plain_name.endswith(_SUFFIX):
        if exists(probe.address[: -len(compression_of(probe.name) or "")]):
            raise DataError(f"{probe.address}: is there uncompressed too; remove one of the two")
        return False
    if probe.base != "index.json":
        return False
    names, folder = _indexed(probe.address), probe.address.rpartition("/")[0]
    for alternatives in names or ():
        if not any(exists(f"{folder}/{name}" if folder else name) for name in alternatives):
            raise DataError(
                f"{probe.address}: names the shard {alternatives[0]}, which is not there; copy it, or remove index.json"
            )
    return names is not None


def _indexed(address: str) -> list[list[str]] | None:
    """The names of each shard in an index.json, uncompressed and compressed; None for others. Raises DataError."""
    try:
        with open_address(address) as opened:
            data = opened.read(_MAX_INDEX_BYTES + 1)
        if len(data) > _MAX_INDEX_BYTES or b'"mds"' not in data:
            return None
        tree = parse_json(data)
        shards = tree.get("shards") if isinstance(tree, dict) else None
        if not isinstance(shards, list) or not all(
            isinstance(shard, dict) and shard.get("format") == "mds" for shard in shards
        ):
            return None
        names = [
            [shard[key]["basename"] for key in ("raw_data", "zip_data") if shard.get(key) is not None]
            for shard in shards
        ]
        for name in (name for alternatives in names for name in alternatives):
            checked_path(name)
        return names if all(names) else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{address}: is no index of MDS shards: {error}; copy it again") from error
    except OSError as error:
        raise DataError(f"{address}: cannot be read: {file_problem(error)}") from error


READER = Reader(
    name="mds",
    holds="tokens",
    read=partial(_documents, False),
    detect=lambda probe: _kind(probe) == "mds",
    goes_with=_belongs,
    num_units=_num_samples,
)
ROWS = Reader(
    name="mds_rows", holds="rows", read=partial(_documents, True), detect=lambda probe: False, num_units=_num_samples
)
TEXT = Reader(
    name="mds_text",
    holds="text",
    read=mds_text,
    detect=lambda probe: _kind(probe) == "mds_text",
    num_units=_num_samples,
)
READERS = (READER, ROWS, TEXT)
