"""The formats that are read: recognising the format of a file, and finding its reader."""

from __future__ import annotations

from weftrain.core.errors import DataError
from weftrain.data_prep.readers import (
    amber,
    arrow,
    cerebras,
    datatrove,
    json_array,
    json_lines,
    litdata,
    mds,
    megatron,
    npy,
    parquet,
    text,
    warc,
)
from weftrain.data_prep.readers.contract import Probe, Reader, always_data, goes_with_none

# In the order in which they are asked whether a file is theirs.
READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        amber.READER,
        json_lines.READER,
        json_array.READER,
        parquet.READER,
        arrow.READER,
        warc.READER,
        cerebras.ROWS,
        cerebras.CORPUS,
        megatron.READER,
        datatrove.READER,
        npy.READER,
        mds.READER,
        mds.ROWS,
        mds.TEXT,
        litdata.READER,
        litdata.ROWS,
        litdata.TEXT,
        text.PYTHON,
        text.TEXT,
    )
}


_WITH_OTHERS = tuple(reader for reader in READERS.values() if reader.goes_with is not goes_with_none)
_WITH_OTHER_FILES = tuple(reader for reader in READERS.values() if reader.not_data is not always_data)


def reader_named(name: str) -> Reader:
    """Raises DataError for an unknown format."""
    if name not in READERS:
        raise DataError(f"--format {name}: there is {', '.join(READERS)}")
    return READERS[name]


def goes_with_another(probe: Probe) -> bool:
    """Whether a file is read with another, as Megatron's index is."""
    return any(reader.goes_with(probe) for reader in _WITH_OTHERS)


def reason_not_data(probe: Probe) -> str | None:
    """Why a file of a known format in a folder is no input, or None."""
    return next((reason for reader in _WITH_OTHER_FILES if (reason := reader.not_data(probe)) is not None), None)


def detect(probe: Probe) -> Reader:
    """The format of a file that is read by itself. Raises DataError."""
    return next(reader for reader in READERS.values() if reader.detect(probe))
