"""Parquet: a row a document, its text in a column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from weftrain.core.errors import DataError
from weftrain.data_prep.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.files import is_local, open_address
from weftrain.data_prep.normalisation import normalise
from weftrain.data_prep.read_options import ReadOptions
from weftrain.data_prep.readers.contract import Reader, Records, one_line

_PARQUET_ROWS = 512  # of a batch


def open_parquet(file: InputFile) -> Any:
    """A pyarrow ParquetFile. Raises DataError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError("reading .parquet needs pyarrow: pip install 'weftrain[data]'") from None
    try:
        return ParquetFile(file.address if is_local(file.address) else open_address(file.address))
    except (ArrowException, OSError) as error:
        raise DataError(f"{file.address}: cannot be read as Parquet: {one_line(error)}; copy it again") from error


def parquet_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """Rows of a Parquet file's row groups, the text in the column options.text_key; a few hundred rows in memory at once."""
    opened = open_parquet(file)
    keys = [options.text_key] + ([options.source_key] if options.source_key is not None else [])
    for key in keys:
        if key not in opened.schema_arrow.names:
            raise DataError(f"{file.address}: has no column '{key}' but {', '.join(opened.schema_arrow.names)}; name it with --text-key")
        kind = str(opened.schema_arrow.field(key).type)
        if kind not in ("string", "large_string", "string_view"):
            raise DataError(f"{file.address}: column '{key}' holds {kind}, not text; name another with --text-key")
    groups = list(range(share.begin, share.end if share.end != -1 else opened.num_row_groups))
    number = 0
    for batch in _batches(file, opened, groups, keys):
        columns = [batch.column(key).to_pylist() for key in keys]
        for values in zip(*columns, strict=True):
            if any(value is None for value in values):
                yield Failure(index, number, f"column '{keys[values.index(None)]}' is null; give it a text, or leave the row out")
            else:
                source = values[1] if len(values) > 1 else file.source
                yield Document(index, number, source, normalise(values[0], options.normalise))
            number += 1
    return number


def _batches(file: InputFile, opened: Any, groups: list[int], keys: list[str]) -> Iterator[Any]:
    from pyarrow import ArrowException

    try:
        for batch in opened.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=keys):
            batch.validate(full=True)  # UTF-8 too, which a damaged file need not hold
            yield batch
    except (ArrowException, OSError) as error:
        raise DataError(f"{file.address}: damaged: {one_line(error)}; copy it again") from error


def _row_groups(file: InputFile) -> int:
    return int(open_parquet(file).num_row_groups)


def _rows_before(file: InputFile, group: int) -> int:
    metadata = open_parquet(file).metadata
    return sum(metadata.row_group(number).num_rows for number in range(group))


READER = Reader(
    name="parquet",
    holds="text",
    read=parquet_rows,
    detect=lambda probe: probe.plain_name.endswith(".parquet"),
    num_units=_row_groups,
    records_before=_rows_before,
)
