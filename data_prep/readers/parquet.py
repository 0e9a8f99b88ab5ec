"""Parquet: one document per row, its text in a column.

Pages are read one at a time, so memory does not grow with the row group. A share is a range of rows: whole row groups,
or part of a large one. A share within a row group decodes what precedes it, so a group is cut into a few only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weftrain.core.errors import DataError, one_line
from weftrain.data_prep.inputs.compression import compression_of
from weftrain.data_prep.inputs.files import BLOCK_BYTES, is_local, open_address
from weftrain.data_prep.readers.arrow_columns import TextColumns, batch_rows, documents_of, find_columns
from weftrain.data_prep.readers.contract import Probe, Reader, Records
from weftrain.data_prep.readers.documents import InputFile, Share
from weftrain.data_prep.readers.read_options import ReadOptions

MAX_CUTS = 8  # of one row group


@contextmanager
def open_parquet(file: InputFile) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises DataError, also for damage found later."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError("reading .parquet needs pyarrow: pip install 'weftrain[data]'") from None
    if compression_of(file.address) is not None:
        raise DataError(
            f"{file.address}: Parquet is compressed by itself, and this file as a whole once more; decompress it"
        )
    raw = file.address if is_local(file.address) else open_address(file.address)
    try:
        opened = ParquetFile(raw, buffer_size=BLOCK_BYTES, pre_buffer=False, memory_map=False)
        try:
            yield opened
        finally:
            opened.close(force=True)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.address}: cannot be read as Parquet: {one_line(error)}; copy it again") from error


def parquet_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    with open_parquet(file) as opened:
        columns = find_columns(file, opened.schema_arrow, options)
        sizes = _group_rows(opened)
        _, end = share.bounds(sum(sizes))
        first = 0  # of the row group
        for group, num_rows in enumerate(sizes):
            begin, stop = max(share.begin, first), min(end, first + num_rows)
            if begin < stop:
                for place, batch in _batches(file, opened, group, columns, begin - first, stop - first):
                    yield from documents_of(index, first + place - share.begin, batch, columns, file, options)
            first += num_rows
    return end - share.begin


def _batches(
    file: InputFile, opened: Any, group: int, columns: TextColumns, begin: int, stop: int
) -> Iterator[tuple[int, Any]]:
    """Rows begin..stop of a row group, in batches, each with the number of its first row."""
    metadata = opened.metadata.row_group(group)
    rows = batch_rows(metadata.total_byte_size, metadata.num_rows)
    names = [".".join(path) for path in columns.paths]
    place = 0
    for batch in opened.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
        skipped = min(max(0, begin - place), len(batch))
        wanted = batch.slice(skipped, min(len(batch), stop - place) - skipped)
        if len(wanted):
            yield place + skipped, wanted
        place += len(batch)
        if place >= stop:
            return
    raise DataError(
        f"{file.address}: damaged: row group {group} has {place:,} rows of {metadata.num_rows:,}; copy it again"
    )


def _group_rows(opened: Any) -> list[int]:
    metadata = opened.metadata
    return [max(0, int(metadata.row_group(group).num_rows)) for group in range(metadata.num_row_groups)]


def _num_rows(file: InputFile) -> int:
    with open_parquet(file) as opened:
        return sum(_group_rows(opened))


def _cuts(file: InputFile, pieces: int) -> list[int]:
    """Where shares end: small row groups together, large ones cut."""
    with open_parquet(file) as opened:
        rows = _group_rows(opened)
        sizes = [max(0, int(opened.metadata.row_group(group).total_byte_size)) for group in range(len(rows))]
    share_bytes = max(1, -(-sum(sizes) // pieces))
    ends, first, held = [], 0, 0
    for num_rows, size in zip(rows, sizes, strict=True):
        if held and held + size > share_bytes:
            ends.append(first)
            held = 0
        cuts = max(1, min(MAX_CUTS, size // share_bytes, num_rows))
        ends += [first + num_rows * cut // cuts for cut in range(1, cuts)]
        first, held = first + num_rows, held + size // cuts
    return sorted({*ends, first})


def _is_parquet(probe: Probe) -> bool:
    return probe.plain_name.endswith((".parquet", ".pq")) or (probe.head.startswith(b"PAR1") and b"\0" in probe.head)


READERS = (
    Reader(name="parquet", holds="text", read=parquet_rows, detect=_is_parquet, num_units=_num_rows, cuts=_cuts),
)
