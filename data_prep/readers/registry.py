"""The formats that are read: recognising the format of a file, and finding its reader."""

from __future__ import annotations

import importlib

from weftrain.core.errors import DataError
from weftrain.data_prep.readers.contract import Probe, Reader, always_data, goes_with_none

# Modules of this package, in the order in which their READERS are asked whether a file is theirs.
_MODULES = (
    "amber",
    "json_lines",
    "json_array",
    "parquet",
    "arrow",
    "warc",
    "cerebras",
    "megatron",
    "datatrove",
    "npy",
    "mds",
    "litdata",
    "text",
)
READERS: dict[str, Reader] = {
    reader.name: reader
    for module in _MODULES
    for reader in importlib.import_module(f"weftrain.data_prep.readers.{module}").READERS
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
