"""The file layout that MDS and litdata share: the number of samples, their places, and in each its columns in sequence.

Only requested columns are read. Places and sizes are checked against each other first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from weftrain.core.errors import DataError
from weftrain.data_prep.readers.contract import Records, wrong_length
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.ids import MAX_DOCUMENT_IDS, choose_field, ids_document, read_stream
from weftrain.data_prep.readers.normalisation import normalise
from weftrain.data_prep.readers.read_options import ReadOptions

WIDTH = np.dtype("<u4")
_MAX_SAMPLES = 1 << 25
_MAX_COLUMN_BYTES = 4 * MAX_DOCUMENT_IDS
_LOOK_SAMPLES = 64
_PICKLED = ("pkl", "pickle")


@dataclass(frozen=True)
class SampleColumn:
    """size: in bytes, if fixed; otherwise each sample states it."""

    name: str
    encoding: str
    size: int | None = None


@dataclass(frozen=True)
class SampleTable:
    """starts: uint32 [samples + 1], bytes of the stream. columns: in a sample's order. name: in messages. seekable: the
    stream is the file itself. bare: a sample is its one column, without its size.
    """

    name: str
    starts: np.ndarray
    columns: tuple[SampleColumn, ...]
    seekable: bool
    bare: bool = False

    @property
    def samples(self) -> int:
        return len(self.starts) - 1

    def column(self, name: str) -> SampleColumn:
        return next(column for column in self.columns if column.name == name)

    def shown(self) -> str:
        return ", ".join(f"{column.name} ({column.encoding})" for column in self.columns)

    def records(self, share: Share) -> int:
        return self.samples if share.end == -1 else share.end - share.begin


def read_count(opened: IO[bytes], name: str) -> int:
    return int(np.frombuffer(read_stream(opened, name, 4), WIDTH)[0])


def read_starts(opened: IO[bytes], name: str, num_bytes: int | None, samples: int | None = None) -> np.ndarray:
    """uint32 [samples + 1] places, after their count unless given. num_bytes: of the stream. Raises DataError."""
    samples = read_count(opened, name) if samples is None else samples
    if samples > _MAX_SAMPLES or (num_bytes is not None and 4 * (samples + 2) > num_bytes):
        raise DataError(
            f"{name}: declares {samples:,} samples, more than it holds or than {_MAX_SAMPLES:,}; copy it again"
        )
    starts = np.frombuffer(read_stream(opened, name, 4 * (samples + 1)), WIDTH)
    if (starts[1:] < starts[:-1]).any() or (num_bytes is not None and int(starts[-1]) != num_bytes):
        raise DataError(f"{name}: the places of its samples do not rise to its end; copy it again")
    return starts


def read_samples(
    opened: IO[bytes], table: SampleTable, wanted: tuple[str, ...], share: Share
) -> Iterator[tuple[bytes, ...] | str]:
    """The wanted columns' bytes of each sample of a share, or what is wrong with it. Raises DataError. `opened` is at
    the first sample.
    """
    begin, end = share.bounds(table.samples)
    variable = 0 if table.bare else sum(column.size is None for column in table.columns)
    at = int(table.starts[0])
    for start, stop in zip(table.starts[begin:end].tolist(), table.starts[begin + 1 : end + 1].tolist(), strict=True):
        at = _move(opened, table, at, start)
        if stop - start < 4 * variable:
            yield "the sample is shorter than the sizes of its columns"
            continue
        widths = iter(
            [stop - start]
            if table.bare
            else np.frombuffer(read_stream(opened, table.name, 4 * variable), WIDTH).tolist()
        )
        at += 4 * variable
        sizes = [next(widths) if column.size is None else column.size for column in table.columns]
        if at + sum(sizes) != stop:
            yield f"the sample has {stop - at:,} bytes of columns that say they have {sum(sizes):,}"
            continue
        found, place = {}, at
        for column, size in zip(table.columns, sizes, strict=True):
            if column.name in wanted and size <= _MAX_COLUMN_BYTES:
                at = _move(opened, table, at, place)
                found[column.name] = read_stream(opened, table.name, size)
                at += size
            place += size
        if len(found) == len(wanted):
            yield tuple(found[name] for name in wanted)
        else:
            yield f"the sample has more than {_MAX_COLUMN_BYTES:,} bytes in one column; split it"


def _move(opened: IO[bytes], table: SampleTable, at: int, to: int) -> int:
    """Go from byte `at` to byte `to`, which must not precede it unless the stream is seekable."""
    if table.seekable:
        opened.seek(to)
    else:
        read_stream(opened, table.name, to - at, keep=False)
    return to


def tokens_column(
    table: SampleTable,
    options: ReadOptions,
    holds_ids: Callable[[SampleColumn], bool],
    may_hold_ids: Callable[[SampleColumn], bool],
) -> SampleColumn:
    """The column of ids: options.tokens_key, or the one that holds them. Raises DataError. holds_ids: the encoding
    alone says so. may_hold_ids: such ids can be read.
    """
    certain = [column.name for column in table.columns if holds_ids(column)]
    possible = [column.name for column in table.columns if may_hold_ids(column)]
    fields = {column.name: column.encoding for column in table.columns}
    column = table.column(choose_field(table.name, options.tokens_key, fields, certain, possible))
    if column.encoding in _PICKLED:
        raise DataError(
            f"{table.name}: column '{column.name}' is pickled, and reading it could run any code: write it as an array"
        )
    if not may_hold_ids(column):
        raise DataError(
            f"{table.name}: column '{column.name}' is of {column.encoding}, which holds no ids; name another with "
            "--tokens-key"
        )
    return column


def ids_documents(
    opened: IO[bytes],
    table: SampleTable,
    column: SampleColumn,
    decode: Callable[[bytes], np.ndarray | str],
    index: int,
    file: InputFile,
    share: Share,
    row_options: ReadOptions | None,
) -> Records:
    """One document per sample, by `decode`. row_options: where each must be a packed row."""
    for number, found in enumerate(read_samples(opened, table, (column.name,), share)):
        ids = found if isinstance(found, str) else decode(found[0])
        if isinstance(found, str) or isinstance(ids, str):
            yield Failure(index, number, found if isinstance(found, str) else f"field '{column.name}' {ids}")
        elif row_options is not None and (wrong := wrong_length(len(ids), row_options)) is not None:
            yield Failure(index, number, wrong)
        else:
            yield ids_document(index, number, file.source, ids)
    return table.records(share)


def text_documents(
    opened: IO[bytes],
    table: SampleTable,
    text_column: str,
    index: int,
    file: InputFile,
    share: Share,
    options: ReadOptions,
) -> Records:
    """One document per sample from a text column; options.source_key may name its source. Raises DataError."""
    wanted = (text_column,) if options.source_key is None else (text_column, options.source_key)
    for name, option in zip(wanted, ("--text-key", "--source-key"), strict=False):
        if not any(column.name == name and column.encoding == "str" for column in table.columns):
            raise DataError(f"{table.name}: has no column '{name}' of text but {table.shown()}; name one with {option}")
    for number, found in enumerate(read_samples(opened, table, wanted, share)):
        yield (
            Failure(index, number, found)
            if isinstance(found, str)
            else _text_document(found, index, number, file, options)
        )
    return table.records(share)


def _text_document(
    found: tuple[bytes, ...], index: int, number: int, file: InputFile, options: ReadOptions
) -> Document | Failure:
    try:
        text, *source = (data.decode() for data in found)
    except UnicodeDecodeError as error:
        return Failure(index, number, f"byte {error.start} is not UTF-8 ({error.reason}); write it as UTF-8")
    return Document(index, number, source[0] if source else file.source, normalise(text, options.normalise))


def check_lengths_differ(opened: IO[bytes], table: SampleTable, column: str, format: str) -> None:
    """Raises DataError where the first samples have equal lengths: they may be packed rows or documents."""
    if table.samples < 2:
        return
    share = Share(0, 0, min(table.samples, _LOOK_SAMPLES))
    sizes = {len(found[0]) for found in read_samples(opened, table, (column,), share) if not isinstance(found, str)}
    if len(sizes) == 1:
        problem = f"{table.name}: its samples all hold equally many ids"
        raise DataError(
            f"{problem}: say with --format {format}_rows that they are packed rows, or with --format {format}: "
            "documents"
        )
