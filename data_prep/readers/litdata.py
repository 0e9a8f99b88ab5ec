"""litdata's chunks `chunk-*.bin`, described by index.json beside them, with ids or text, optionally zstd-compressed.

A chunk is the number of items (uint32), the starts of the items and the end of the last (uint32), and the items. By
index.json an item is ids alone (TokensLoader), or the sizes of its leaves (uint32) and the leaves (PyTreeLoader). Only
the requested leaf is decoded, never a pickled one. Encrypted chunks, and rows kept as Arrow, are refused.
"""

from __future__ import annotations

import functools
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np

from weftrain.core.errors import DataError, file_problem, one_line
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import open_plain
from weftrain.core.formats.safe_names import path_below
from weftrain.data_prep.inputs.files import is_local
from weftrain.data_prep.readers.contract import Probe, Reader, Records, local_only
from weftrain.data_prep.readers.documents import InputFile, Share
from weftrain.data_prep.readers.ids import ids_of_bytes, ids_of_list, read_stream
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.sample_table import (
    SampleColumn,
    SampleTable,
    check_lengths_differ,
    ids_documents,
    read_starts,
    text_documents,
    tokens_column,
)

_INDEX = "index.json"
_CHUNK_NAME = re.compile(r"chunk-[0-9]+-[0-9]+(\.zstd)?\.bin")  # as litdata names them; an index may name others
_MAX_INDEX_BYTES = 256 << 20  # a hundred bytes a chunk
_MAX_WINDOW_BYTES = 1 << 27
_FRAMED, _ARROW = b"LDFZ01\0\0", b"LDARW01\0"
_FRAMED_HEAD = struct.Struct("<8sHHIII")  # magic, version, flags, items, items of a frame, frames
_FRAME_BYTES = 24
# Of litdata's numbered types those of integers; the order of its tables is part of the format.
_TORCH = {11: "<u1", 12: "<i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
_NUMPY = {0: "<i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "<u1", 5: "<u2", 6: "<u4", 7: "<u8"}


@dataclass(frozen=True)
class _Index:
    """columns: of an item; bare: without sizes before them. compression: 'chunk', 'batch', None. chunks: items."""

    columns: tuple[SampleColumn, ...]
    bare: bool
    compression: str | None
    chunks: dict[str, int]


def _index_of(address: str) -> _Index | None:
    """The index beside a chunk, or None. Raises DataError."""
    path = str(PurePosixPath(address).with_name(_INDEX))
    if not is_local(address) or not os.path.isfile(path):
        return None
    status = os.stat(path)
    return _parsed(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _parsed(path: str, num_bytes: int, modified_ns: int) -> _Index | None:
    try:
        with open_plain(Path(path)) as opened:
            data = opened.read(_MAX_INDEX_BYTES + 1)
        if len(data) > _MAX_INDEX_BYTES or b'"data_format"' not in data:
            return None
        tree = parse_json(data)
        if (
            not isinstance(tree, dict)
            or not isinstance(tree.get("config"), dict)
            or not isinstance(tree.get("chunks"), list)
        ):
            return None
        return _checked(path, tree["config"], tree["chunks"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no index of litdata's chunks: {one_line(error)}; copy it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {file_problem(error)}") from error


def _checked(path: str, config: dict[str, Any], chunks: list[Any]) -> _Index:
    counts: dict[str, int] = {}
    for chunk in chunks:
        path_below(Path(path).parent, chunk["filename"])
        if type(chunk["chunk_size"]) is not int or chunk["chunk_size"] < 0:
            raise ValueError(f"chunk {chunk['filename']!r} has no number of items")
        counts[chunk["filename"]] = chunk["chunk_size"]
    loader = config.get("item_loader") or (
        "TokensLoader" if chunks and chunks[0].get("dim") is not None else "PyTreeLoader"
    )
    if loader not in ("TokensLoader", "PyTreeLoader"):
        raise DataError(f"{path}: its items are of {loader}; those of TokensLoader and PyTreeLoader are read")
    if config.get("encryption") is not None:
        raise DataError(f"{path}: its chunks are encrypted; write them without encryption")
    compression, level = config.get("compression"), config.get("compression_level")
    if compression is not None and (not str(compression).startswith("zstd") or level not in (None, "chunk", "batch")):
        raise DataError(
            f"{path}: its chunks are compressed as {compression}, level {level}; zstd of whole chunks or of batches is "
            "read"
        )
    encodings = config["data_format"]
    if not isinstance(encodings, list) or not encodings or not all(isinstance(encoding, str) for encoding in encodings):
        raise ValueError("'data_format' is no list of encodings")
    names = _leaf_names(config.get("data_spec"), len(encodings))
    columns = tuple(SampleColumn(name, encoding) for name, encoding in zip(names, encodings, strict=True))
    if loader == "TokensLoader" and (len(columns) != 1 or _dtype(columns[0].encoding) is None):
        raise ValueError(f"its items are of TokensLoader, and their format {encodings} is not one of ids")
    return _Index(columns, loader == "TokensLoader", None if compression is None else level or "chunk", counts)


def _leaf_names(spec: Any, count: int) -> list[str]:
    """The keys if the leaves form a dictionary, else their numbers."""
    tree = parse_json(spec.encode()) if isinstance(spec, str) else None
    node = tree[1] if isinstance(tree, list) and len(tree) == 2 and isinstance(tree[1], dict) else {}
    keys = (
        parse_json(node["context"].encode())
        if node.get("type") == "builtins.dict" and isinstance(node.get("context"), str)
        else None
    )
    if isinstance(keys, list) and len(keys) == count == len(set(map(str, keys))):
        return [str(key) for key in keys]
    return [str(number) for number in range(count)]


def _dtype(encoding: str) -> np.dtype[Any] | None:
    """The type of leaves that are integers of one dimension, or None."""
    kind, _, number = encoding.partition(":")
    types = {"no_header_tensor": _TORCH, "no_header_numpy": _NUMPY}.get(kind, {})
    found = types.get(int(number)) if number.isascii() and number.isdigit() and len(number) < 4 else None
    return None if found is None else np.dtype(found)


def _holds_ids(column: SampleColumn) -> bool:
    return _dtype(column.encoding) is not None


def _may_hold_ids(column: SampleColumn) -> bool:
    return _holds_ids(column) or column.encoding in ("bytes", "json")


class _Unzipped:
    """A stream of zstd frames, from the current position of a file."""

    def __init__(self, opened: IO[bytes], name: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError("reading compressed chunks needs zstandard: pip install 'weftrain[data]'") from None
        self._name, self._error = name, zstandard.ZstdError
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._stream = decompressor.stream_reader(opened, read_across_frames=True, closefd=False)

    def read(self, count: int) -> bytes:
        try:
            return bytes(self._stream.read(count))
        except self._error as error:
            raise DataError(f"{self._name}: damaged: {one_line(error)}; copy it again") from error


def _unnamed(address: str) -> DataError:
    return DataError(
        f"{address}: is named by no {_INDEX} of litdata beside it, which says what it holds; copy that too"
    )


@contextmanager
def _chunk(address: str, index: _Index | None) -> Iterator[tuple[IO[bytes], SampleTable]]:
    """An opened chunk and where its items are. Raises DataError."""
    local_only(address, "litdata's chunks")
    name = PurePosixPath(address).name
    if index is None or name not in index.chunks:
        raise _unnamed(address)
    with open(address, "rb") as opened:
        num_bytes = os.fstat(opened.fileno()).st_size
        stream: IO[bytes] = opened
        if index.compression == "chunk":
            stream = cast(IO[bytes], _Unzipped(opened, address))
            starts = read_starts(stream, address, None)
        elif index.compression == "batch":
            starts = _framed_starts(opened, address, num_bytes)
            stream = cast(IO[bytes], _Unzipped(opened, address))
        else:
            _refuse_arrow(opened, address, num_bytes)
            starts = read_starts(opened, address, num_bytes)
        if len(starts) - 1 != index.chunks[name] or int(starts[0]) != (
            0 if index.compression == "batch" else 4 * (len(starts) + 1)
        ):
            raise DataError(
                f"{address}: holds {len(starts) - 1:,} items, {_INDEX} says {index.chunks[name]:,}; copy both again"
            )
        yield stream, SampleTable(address, starts, index.columns, index.compression is None, index.bare)


def _framed_starts(opened: IO[bytes], name: str, num_bytes: int) -> np.ndarray:
    """For a chunk with items compressed in batches; leaves the file at the first frame."""
    magic, version, _, items, _, frames = _FRAMED_HEAD.unpack(read_stream(opened, name, _FRAMED_HEAD.size))
    if magic != _FRAMED or version != 1 or _FRAMED_HEAD.size + 4 * (items + 1) + _FRAME_BYTES * frames > num_bytes:
        raise DataError(f"{name}: does not begin as a chunk of compressed batches does; copy it again")
    starts = read_starts(opened, name, None, samples=items)
    read_stream(opened, name, _FRAME_BYTES * frames, keep=False)  # the frames follow each other
    return starts


def _refuse_arrow(opened: IO[bytes], name: str, num_bytes: int) -> None:
    opened.seek(max(0, num_bytes - len(_ARROW)))
    if opened.read(len(_ARROW)) == _ARROW:
        raise DataError(
            f"{name}: keeps its rows as Arrow, as litdata does for lists and nested values: write ids as arrays or "
            "tensors"
        )
    opened.seek(0)


def _documents(as_rows: bool, number: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    with _chunk(file.address, _index_of(file.address)) as (opened, table):
        column = tokens_column(table, options, _holds_ids, _may_hold_ids)
        decode = partial(_decode, column.encoding, options)
        return (
            yield from ids_documents(opened, table, column, decode, number, file, share, options if as_rows else None)
        )


def litdata_text(number: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """One document per item: the leaf options.text_key, or the only one, of encoding str."""
    with _chunk(file.address, _index_of(file.address)) as (opened, table):
        only = len(table.columns) == 1 and table.columns[0].name == "0"  # an item that is a string, not a dictionary
        return (
            yield from text_documents(opened, table, "0" if only else options.text_key, number, file, share, options)
        )


def _decode(encoding: str, options: ReadOptions, data: bytes) -> np.ndarray | str:
    """The ids of a leaf, integers [n], or what is wrong with it."""
    if encoding == "json":
        return ids_of_list(data)
    dtype = _dtype(encoding)
    if dtype is None:
        return ids_of_bytes(data, options)
    return (
        np.frombuffer(data, dtype)
        if len(data) % dtype.itemsize == 0
        else f"has {len(data):,} bytes, which are no ids of {dtype.name}"
    )


def _num_items(file: InputFile) -> int:
    """Items; 1 for a compressed chunk, which is not cut. Raises DataError."""
    index = _index_of(file.address)
    if index is None or index.compression is not None:
        return 1
    return index.chunks.get(PurePosixPath(file.address).name, 1)


def _kind(probe: Probe) -> str | None:
    """'litdata', 'litdata_text' or None. Raises DataError for a chunk with both, or if rows look like documents."""
    if not probe.name.endswith(".bin"):
        return None
    index = _index_of(probe.address)
    if index is None or probe.base not in index.chunks:
        if _CHUNK_NAME.fullmatch(probe.base):
            local_only(probe.address, "litdata's chunks")
            raise _unnamed(probe.address)
        return None
    ids = [column.name for column in index.columns if column.name in ("tokens", "input_ids")]
    ids = ids or [column.name for column in index.columns if _dtype(column.encoding) is not None]
    texts = [column.name for column in index.columns if column.encoding == "str"]
    if ids and "text" in texts:
        raise DataError(
            f"{probe.address}: holds text and ids: say which with --format litdata_text or --format litdata"
        )
    if not ids:
        return "litdata_text" if texts else "litdata"
    if len(ids) == 1:
        with _chunk(probe.address, index) as (opened, table):
            check_lengths_differ(opened, table, ids[0], "litdata")
    return "litdata"


def _belongs(probe: Probe) -> bool:
    """Whether a file is the index of chunks, all of which must exist. Raises DataError."""
    if probe.base != _INDEX:
        return False
    if not is_local(probe.address) and b'"data_format"' in probe.head:
        local_only(probe.address, "litdata's chunks")
    if (index := _index_of(probe.address)) is None:
        return False
    for name in index.chunks:
        if not path_below(Path(probe.address).parent, name).is_file():
            raise DataError(f"{probe.address}: names the chunk {name}, which is not there; copy it, or remove {_INDEX}")
    return True


def _beside(file: InputFile) -> tuple[str, ...]:
    """The index goes with the first chunk: with each, hashing would take quadratic time."""
    index, path = _index_of(file.address), PurePosixPath(file.address)
    return (str(path.with_name(_INDEX)),) if index is not None and path.name == next(iter(index.chunks), None) else ()


READER = Reader(
    name="litdata",
    holds="tokens",
    read=partial(_documents, False),
    detect=lambda probe: _kind(probe) == "litdata",
    goes_with=_belongs,
    num_units=_num_items,
    beside=_beside,
)
ROWS = Reader(
    name="litdata_rows",
    holds="rows",
    read=partial(_documents, True),
    detect=lambda probe: False,
    num_units=_num_items,
    beside=_beside,
)
TEXT = Reader(
    name="litdata_text",
    holds="text",
    read=litdata_text,
    detect=lambda probe: _kind(probe) == "litdata_text",
    num_units=_num_items,
    beside=_beside,
)
READERS = (READER, ROWS, TEXT)
