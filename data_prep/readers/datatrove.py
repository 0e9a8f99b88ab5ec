"""datatrove's .ds of ids, with the documents' ends in .ds.index and an optional loss mask in .ds.loss.

Ids have 2 or 4 bytes: the index ends with the number of ids, and .ds.metadata, if present, must agree.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.data_prep.inputs.files import exists
from weftrain.data_prep.readers.contract import Probe, Reader, Records, local_only
from weftrain.data_prep.readers.documents import Failure, InputFile, Share
from weftrain.data_prep.readers.ids import MAX_DOCUMENT_IDS, TABLE_ROWS, ids_document, read_array, too_long
from weftrain.data_prep.readers.read_options import ReadOptions

_INDEX, _LOSS, _METADATA = ".index", ".loss", ".metadata"
_ENDS = np.dtype("<u8")
_METADATA_BYTES = 4096  # a tokenizer's name and two numbers


@dataclass(frozen=True)
class _Layout:
    dtype: np.dtype[Any]
    ids: int
    documents: int


def _check_there(address: str) -> None:
    local_only(address, "datatrove's .ds files")
    if not exists(address + _INDEX):
        raise DataError(
            f"{address}: has no {Path(address).name}{_INDEX} beside it, which tells its documents apart; copy that too"
        )


def _layout(file: InputFile) -> _Layout:
    """What the files beside a .ds say, checked against its size. Raises DataError."""
    _check_there(file.address)
    index = file.address + _INDEX
    num_bytes = os.stat(index).st_size
    documents = num_bytes // _ENDS.itemsize
    if not documents or num_bytes % _ENDS.itemsize:
        raise DataError(
            f"{index}: has {num_bytes:,} bytes, which are no ends of documents of 8 bytes each; copy it again"
        )
    with open(index, "rb") as opened:
        ids = int(read_array(opened, index, num_bytes - _ENDS.itemsize, 1, _ENDS)[0])
    width = next((width for width in (2, 4) if ids * width == file.num_bytes), None)
    if width is None:
        raise DataError(
            f"{index}: its last document ends at id {ids:,}, and {file.num_bytes:,} bytes are that many of neither 2 "
            "nor 4 bytes"
        )
    said = _width_said(file)
    if said is not None and said != width and ids:
        raise DataError(
            f"{file.address}{_METADATA}: says that an id takes {said} bytes, the index that it takes {width}; copy "
            "them again"
        )
    if exists(file.address + _LOSS) and os.stat(file.address + _LOSS).st_size != ids:
        raise DataError(f"{file.address}{_LOSS}: has not one byte for each of the {ids:,} ids; copy it again")
    return _Layout(np.dtype(f"<u{width}"), ids, documents)


def _width_said(file: InputFile) -> int | None:
    """Bytes per id by .ds.metadata, whose first line is `tokenizer|bytes`."""
    if not exists(file.address + _METADATA):
        return None
    with open(file.address + _METADATA, "rb") as opened:
        line = opened.read(_METADATA_BYTES).split(b"\n")[0]
    found = re.search(rb"\|([0-9]{1,4})$", line)
    return int(found.group(1)) if found is not None else None


def datatrove_documents(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    layout = _layout(file)
    begin, end = share.bounds(layout.documents)
    name = file.address + _INDEX
    with contextlib.ExitStack() as files:
        opened, ends = files.enter_context(open(file.address, "rb")), files.enter_context(open(name, "rb"))
        loss = files.enter_context(open(file.address + _LOSS, "rb")) if exists(file.address + _LOSS) else None
        start = int(read_array(ends, name, _ENDS.itemsize * (begin - 1), 1, _ENDS)[0]) if begin else 0
        for first in range(begin, end, TABLE_ROWS):
            stops = read_array(ends, name, _ENDS.itemsize * first, min(TABLE_ROWS, end - first), _ENDS)
            for number, stop in enumerate(stops.tolist(), start=first - begin):
                if not start <= stop <= layout.ids:
                    raise DataError(f"{name}: the ends of its documents do not rise to {layout.ids:,}; copy it again")
                if stop - start > MAX_DOCUMENT_IDS:
                    yield too_long(index, number, stop - start)
                else:
                    ids = read_array(opened, file.address, start * layout.dtype.itemsize, stop - start, layout.dtype)
                    mask = (
                        None
                        if loss is None
                        else read_array(loss, file.address + _LOSS, start, stop - start, np.dtype("u1"))
                    )
                    if mask is not None and mask.size and mask.max() > 1:
                        yield Failure(
                            index, number, f"{Path(file.address).name}{_LOSS} holds a loss mask other than 0 and 1"
                        )
                    else:
                        yield ids_document(index, number, file.source, ids, None if mask is None else mask == 1)
                start = stop
    return end - begin


def _beside(file: InputFile) -> tuple[str, ...]:
    return tuple(file.address + suffix for suffix in (_INDEX, _LOSS, _METADATA) if exists(file.address + suffix))


def _belongs(probe: Probe) -> bool:
    return probe.name.endswith((f".ds{_INDEX}", f".ds{_LOSS}", f".ds{_METADATA}")) and probe.has_beside("")


def _is_ds(probe: Probe) -> bool:
    """Raises DataError for one that cannot be read."""
    if not probe.name.endswith(".ds"):
        return False
    _check_there(probe.address)
    return True


READERS = (
    Reader(
        name="datatrove",
        holds="tokens",
        read=datatrove_documents,
        detect=_is_ds,
        goes_with=_belongs,
        num_units=lambda file: _layout(file).documents,
        beside=_beside,
    ),
)
