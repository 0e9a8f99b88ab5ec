"""What readers of tokenised files have in common: reading arrays at an offset, and making a document of ids."""

from __future__ import annotations

from typing import IO, Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.data_prep.documents import Document, Failure
from weftrain.data_prep.marks import LOSS

MAX_ID = (1 << 31) - 1
MAX_DOCUMENT_IDS = 1 << 25  # a document is in memory as a whole, several times: 128 MiB of int32
TABLE_ROWS = 1 << 16  # of an index, read at once


def read_array(opened: IO[bytes], name: str, offset: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """`count` numbers at a byte offset; the caller has held both against the file's size. Raises DataError where it ends before."""
    opened.seek(offset)
    data = opened.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise DataError(f"{name}: ends before byte {offset + count * dtype.itemsize:,}: it is truncated or changed; copy it again")
    return np.frombuffer(data, dtype)


def ids_document(index: int, record: int, source: str, ids: np.ndarray, bears_loss: np.ndarray | None = None) -> Document | Failure:
    """A document of integers [n], of any integer type; a Failure where one of them is no id. bears_loss: bool [n]; None: all do."""
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) <= MAX_ID):
        return Failure(index, record, f"holds the id {ids.min()} or {ids.max()}, which is none")
    marks = None if bears_loss is None or bears_loss.all() else bears_loss * np.uint8(LOSS)
    return Document(index, record, source, None, ids.astype(np.int32), marks)


def too_long(index: int, record: int, length: int) -> Failure:
    return Failure(index, record, f"holds {length:,} ids in one document, more than {MAX_DOCUMENT_IDS:,}; split it")
