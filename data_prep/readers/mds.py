"""MosaicML Streaming's MDS: shards `.mds`, compressed or not, of ids or of text. A shard says itself which columns it has.

A shard is the number of samples (uint32), where each begins and the last ends (uint32), its columns as JSON, and the samples: the sizes of
the columns that have no fixed one, and the columns. Only the column that is asked for is decoded, so pickled ones are never opened; one
that is asked for is refused. `index.json` is read only to see that no shard is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from weftrain.core.canonical import parse_json
from weftrain.core.errors import DataError
from weftrain.core.names import path_below
from weftrain.core.plain_file import open_plain
from weftrain.data_prep.compression import compression_of, open_decompressed
from weftrain.data_prep.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.files import exists, is_local
from weftrain.data_prep.normalisation import normalise
from weftrain.data_prep.read_options import ReadOptions
from weftrain.data_prep.readers.contract import Probe, Reader, Records, wrong_length
from weftrain.data_prep.readers.ids import MAX_DOCUMENT_IDS, array_of, choose_field, ids_document, ids_of_list, read_stream

_SUFFIX = ".mds"
_MAX_SAMPLES, _MAX_COLUMNS_BYTES, _MAX_INDEX_BYTES = 1 << 25, 1 << 20, 64 << 20
_UNSUPPORTED = (".br", ".snappy")
_WIDTH = np.dtype("<u4")
_VALUES = {8: "<u1", 9: "<i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}  # of an ndarray without a fixed type
_NAMES = {np.dtype(dtype).name: dtype for dtype in _VALUES.values()}
_LOOK_SAMPLES = 64


@dataclass(frozen=True)
class _Column:
    """size: in bytes where it is fixed. Else its size stands at the beginning of each sample."""

    name: str
    encoding: str
    size: int | None

    @property
    def holds_ids(self) -> bool:
        """Whether the encoding alone says that it holds integers of one dimension or more."""
        kind, _, rest = self.encoding.partition(":")
        return kind == "ndarray" and (not rest or rest.partition(":")[0] in _NAMES)

    @property
    def may_hold_ids(self) -> bool:
        return self.holds_ids or self.encoding in ("bytes", "json")


@dataclass(frozen=True)
class _Shard:
    """name: of messages. starts: uint32 [samples + 1], bytes. columns: in the order in which a sample has them."""

    name: str
    starts: np.ndarray
    columns: tuple[_Column, ...]

    @property
    def samples(self) -> int:
        return len(self.starts) - 1

    def column(self, name: str) -> _Column:
        return next(column for column in self.columns if column.name == name)


def _open_shard(name: str, opened: IO[bytes], num_bytes: int | None) -> _Shard:
    """The head of a shard; what follows in `opened` are the samples. num_bytes: of a file that is not compressed. Raises DataError."""
    samples = int(array_of(read_stream(opened, name, 4), _WIDTH)[0])
    head = 4 + 4 * (samples + 1)
    if samples > _MAX_SAMPLES or (num_bytes is not None and head > num_bytes):
        raise DataError(f"{name}: declares {samples:,} samples, more than it holds or than {_MAX_SAMPLES:,}; copy it again")
    starts = array_of(read_stream(opened, name, head - 4), _WIDTH)
    rising = bool((starts[1:] >= starts[:-1]).all())
    if not rising or not head < int(starts[0]) <= head + _MAX_COLUMNS_BYTES or (num_bytes is not None and int(starts[-1]) != num_bytes):
        raise DataError(f"{name}: the places of its samples do not rise from the end of its head to its own end; copy it again")
    return _Shard(name, starts, _columns(name, read_stream(opened, name, int(starts[0]) - head)))


def _columns(name: str, data: bytes) -> tuple[_Column, ...]:
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
        return tuple(_Column(*column) for column in zip(names, encodings, sizes, strict=True))
    except ValueError as error:
        raise DataError(f"{name}: its head cannot be read: {error}; copy it again") from error


def _samples(file: InputFile, opened: IO[bytes], shard: _Shard, wanted: tuple[str, ...], share: Share) -> Iterator[tuple[bytes, ...] | str]:
    """The wanted columns' bytes of each sample of a share, or what is wrong with the sample. Raises DataError."""
    seekable = compression_of(file.address) is None
    begin, end = share.begin, share.end if share.end != -1 else shard.samples
    variable = sum(column.size is None for column in shard.columns)
    at = int(shard.starts[0])
    for start, stop in zip(shard.starts[begin:end].tolist(), shard.starts[begin + 1 : end + 1].tolist(), strict=True):
        at = _move(opened, file.address, at, start, seekable)
        if stop - start < 4 * variable:
            yield "is shorter than the sizes of its columns"
            continue
        widths = iter(array_of(read_stream(opened, file.address, 4 * variable), _WIDTH).tolist())
        at += 4 * variable
        sizes = [next(widths) if column.size is None else column.size for column in shard.columns]
        if at + sum(sizes) != stop:
            yield f"has {stop - at:,} bytes of columns that say they have {sum(sizes):,}"
            continue
        found, place = {}, at
        for column, size in zip(shard.columns, sizes, strict=True):
            if column.name in wanted:
                if size > 4 * MAX_DOCUMENT_IDS:
                    break
                at = _move(opened, file.address, at, place, seekable)
                found[column.name] = read_stream(opened, file.address, size)
                at += size
            place += size
        yield tuple(found[name] for name in wanted) if len(found) == len(wanted) else "has more bytes in one column than a document may"


def _move(opened: IO[bytes], name: str, at: int, to: int, seekable: bool) -> int:
    """Goes on from byte `at` to byte `to`, which is not before it in a stream."""
    if seekable:
        opened.seek(to)
    else:
        read_stream(opened, name, to - at, keep=False)
    return to


def _documents(as_rows: bool, index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    with open_decompressed(file.address) as opened:
        shard = _open_shard(file.address, opened, _plain_bytes(file))
        column = shard.column(_tokens_column(shard, options))
        for number, found in enumerate(_samples(file, opened, shard, (column.name,), share)):
            ids = found if isinstance(found, str) else _decode(column, found[0], options)
            wrong = ids if isinstance(ids, str) else wrong_length(len(ids), options) if as_rows else None
            if isinstance(ids, str) or wrong is not None:
                yield Failure(index, number, f"the sample {wrong}" if isinstance(found, str) else f"field '{column.name}' {wrong}")
            else:
                yield ids_document(index, number, file.source, ids)
        return shard.samples if share.end == -1 else share.end - share.begin


def mds_text(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """A sample, a document: the column options.text_key, of encoding str."""
    with open_decompressed(file.address) as opened:
        shard = _open_shard(file.address, opened, _plain_bytes(file))
        wanted = (options.text_key,) if options.source_key is None else (options.text_key, options.source_key)
        for name, option in zip(wanted, ("--text-key", "--source-key"), strict=False):
            if not any(column.name == name and column.encoding == "str" for column in shard.columns):
                have = ", ".join(f"{column.name} ({column.encoding})" for column in shard.columns)
                raise DataError(f"{file.address}: has no column '{name}' of text but {have}; name one with {option}")
        for number, found in enumerate(_samples(file, opened, shard, wanted, share)):
            yield _text_document(index, number, file, found, options)
        return shard.samples if share.end == -1 else share.end - share.begin


def _text_document(index: int, number: int, file: InputFile, found: tuple[bytes, ...] | str, options: ReadOptions) -> Document | Failure:
    if isinstance(found, str):
        return Failure(index, number, f"the sample {found}")
    if len(found[0]) > options.max_line_bytes:
        return Failure(index, number, f"holds more than {options.max_line_bytes:,} bytes in one document; split it")
    try:
        text, *source = (data.decode() for data in found)
    except UnicodeDecodeError as error:
        return Failure(index, number, f"byte {error.start} is not UTF-8 ({error.reason}); write it as UTF-8")
    return Document(index, number, source[0] if source else file.source, normalise(text, options.normalise))


def _tokens_column(shard: _Shard, options: ReadOptions) -> str:
    """Raises DataError where no column, or none alone, can hold the ids."""
    certain = [column.name for column in shard.columns if column.holds_ids]
    possible = [column.name for column in shard.columns if column.may_hold_ids]
    fields = {column.name: column.encoding for column in shard.columns}
    name = choose_field(shard.name, options.tokens_key, fields, certain, possible)
    encoding = shard.column(name).encoding
    if encoding == "pkl":
        raise DataError(f"{shard.name}: column '{name}' is pickled, and reading it could run any code: write it as ndarray")
    if name not in possible:
        raise DataError(f"{shard.name}: column '{name}' is of {encoding}, which holds no ids; name another with --tokens-key")
    return name


def _decode(column: _Column, data: bytes, options: ReadOptions) -> np.ndarray | str:
    """The ids of a column, integers [n], or what is wrong with it."""
    if column.encoding == "json":
        return ids_of_list(data)
    if column.encoding == "bytes":
        dtype = np.dtype(options.tokens_dtype or "int64").newbyteorder("<")
        if len(data) % dtype.itemsize:
            return f"has {len(data):,} bytes, which are no {dtype.name} ids; give another --tokens-dtype"
        return np.frombuffer(data, dtype)
    return _array(column.encoding, data)


def _array(encoding: str, data: bytes) -> np.ndarray | str:
    """An `ndarray[:type[:shape]]`; what the encoding does not fix stands before the values: a byte for the type, then the shape."""
    _, _, rest = encoding.partition(":")
    name, _, shape_said = rest.partition(":")
    at = 0
    if not name:
        name, at = np.dtype(_VALUES.get(data[0] if data else 0, "<f4")).name, 1
    if name not in _NAMES:
        return f"is an array of {name}, not of integers"
    dtype, dimensions, count = np.dtype(_NAMES[name]), 1, (len(data) - at) // np.dtype(_NAMES[name]).itemsize
    if shape_said:
        dimensions, count = shape_said.count(",") + 1, int(shape_said) if re.fullmatch("[0-9]{1,12}", shape_said) else -1
    elif len(data) <= at:
        return "is an array that ends before its shape"
    else:
        width, dimensions = 1 << (data[at] & 3), data[at] >> 2
        count = int.from_bytes(data[at + 1 : at + 1 + width], "little")
        at += 1 + width * dimensions
    if dimensions != 1 or len(data) - at != count * dtype.itemsize:
        return f"is an array of {dimensions} dimensions, the first of {count:,}, in {len(data):,} bytes; one dimension of {name} is read"
    return np.frombuffer(data, dtype, offset=at)


def _plain_bytes(file: InputFile) -> int | None:
    return None if compression_of(file.address) is not None else file.num_bytes


def _num_samples(file: InputFile) -> int:
    """Samples; 1 for a compressed shard, which is not cut. Raises DataError."""
    if compression_of(file.address) is not None:
        return 1
    with open_decompressed(file.address) as opened:
        return int(array_of(read_stream(opened, file.address, 4), _WIDTH)[0])


def _kind(probe: Probe) -> str | None:
    """'mds', 'mds_rows' or 'mds_text'; None for what is no shard. Raises DataError for one that could be more than one of them."""
    if probe.plain_name.endswith(tuple(_SUFFIX + suffix for suffix in _UNSUPPORTED)):
        raise DataError(
            f"{probe.address}: is compressed as {PurePosixPath(probe.name).suffix}; decompress it, or write the shards with zstd"
        )
    if not probe.plain_name.endswith(_SUFFIX):
        return None
    file = InputFile(probe.address, probe.name, "", "mds", 0, None)
    with open_decompressed(probe.address) as opened:
        shard = _open_shard(probe.address, opened, None)
        usual = [column.name for column in shard.columns if column.may_hold_ids and column.name in ("tokens", "input_ids")]
        ids = usual or [column.name for column in shard.columns if column.holds_ids]
        if ids and any(column.encoding == "str" and column.name == "text" for column in shard.columns):
            raise DataError(f"{probe.address}: holds text and ids: say which with --format mds_text or --format mds")
        if not ids:
            return "mds_text" if any(column.encoding == "str" for column in shard.columns) else "mds"
        if len(ids) == 1 and shard.samples > 1:
            share = Share(0, 0, min(shard.samples, _LOOK_SAMPLES))
            sizes = [len(found[0]) for found in _samples(file, opened, shard, (ids[0],), share) if not isinstance(found, str)]
            if len(set(sizes)) == 1:
                problem = f"{probe.address}: its samples all hold equally many ids"
                raise DataError(
                    f"{problem}: say with --format mds_rows that they are packed rows, or with --format mds that they are documents"
                )
        return "mds"


def _belongs(probe: Probe) -> bool:
    """Whether a file is the index of shards, all of which must be there, or the compressed copy of a shard beside it. Raises DataError."""
    if compression_of(probe.name) is not None and probe.plain_name.endswith(_SUFFIX):
        return exists(probe.address[: -len(compression_of(probe.name) or "")])
    if PurePosixPath(probe.name).name != "index.json" or not is_local(probe.address):
        return False
    names = _indexed(probe.address)
    for alternatives in names or ():
        if not any(path_below(Path(probe.address).parent, name).is_file() for name in alternatives):
            raise DataError(f"{probe.address}: names the shard {alternatives[0]}, which is not there; copy it, or remove index.json")
    return names is not None


def _indexed(address: str) -> list[list[str]] | None:
    """The names that an index.json has for each of its shards, uncompressed and compressed; None for another's index. Raises DataError."""
    try:
        with open_plain(Path(address)) as opened:
            data = opened.read(_MAX_INDEX_BYTES + 1)
        if len(data) > _MAX_INDEX_BYTES or b'"mds"' not in data:
            return None
        tree = parse_json(data)
        shards = tree.get("shards") if isinstance(tree, dict) else None
        if not isinstance(shards, list) or not all(isinstance(shard, dict) and shard.get("format") == "mds" for shard in shards):
            return None
        names = [[shard[key]["basename"] for key in ("raw_data", "zip_data") if shard.get(key) is not None] for shard in shards]
        for name in (name for alternatives in names for name in alternatives):
            path_below(Path(address).parent, name)
        return names if all(names) else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{address}: is no index of MDS shards: {error}; copy it again") from error
    except OSError as error:
        raise DataError(f"{address}: cannot be read: {error.strerror or error}") from error


READER = Reader(
    name="mds",
    holds="tokens",
    read=partial(_documents, False),
    detect=lambda probe: _kind(probe) == "mds",
    goes_with=_belongs,
    num_units=_num_samples,
)
ROWS = Reader(name="mds_rows", holds="rows", read=partial(_documents, True), detect=lambda probe: False, num_units=_num_samples)
TEXT = Reader(name="mds_text", holds="text", read=mds_text, detect=lambda probe: _kind(probe) == "mds_text", num_units=_num_samples)
