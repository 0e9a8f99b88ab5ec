"""Shared by readers of tokenised files: reading arrays at an offset, and making a document of ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats.canonical import parse_json
from weftrain.data_prep.marks import LOSS
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.read_options import ReadOptions

MAX_ID = (1 << 31) - 1
MAX_DOCUMENT_IDS = 1 << 25  # a document is in memory as a whole, several times: 128 MiB of int32
TABLE_ROWS = 1 << 16  # of an index, read at once
_BLOCK_BYTES = 1 << 20
_MAX_JSON_BYTES = 16 << 20  # as Python's numbers its ids take some twenty times as much memory


def read_array(opened: IO[bytes], name: str, offset: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """`count` numbers at a byte offset, both checked against the file's size by the caller. Raises DataError."""
    opened.seek(offset)
    data = opened.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise DataError(
            f"{name}: ends before byte {offset + count * dtype.itemsize:,}: it is truncated or changed; copy it again"
        )
    return np.frombuffer(data, dtype)


def ids_document(
    index: int, record: int, source: str, ids: np.ndarray, bears_loss: np.ndarray | None = None
) -> Document | Failure:
    """A document of integers [n]; a Failure where one is no id. bears_loss: bool [n]; None: all do."""
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) <= MAX_ID):
        return Failure(
            index, record, f"holds ids {ids.min()}..{ids.max()}, and each must be one of 0..{MAX_ID}; repair it"
        )
    marks = None if bears_loss is None or bears_loss.all() else bears_loss * np.uint8(LOSS)
    return Document(index, record, source, None, ids.astype(np.int32), marks)


def too_long(index: int, record: int, length: int) -> Failure:
    return Failure(index, record, f"holds {length:,} ids in one document, more than {MAX_DOCUMENT_IDS:,}; split it")


def read_stream(opened: IO[bytes], name: str, count: int, keep: bool = True) -> bytes:
    """The next `count` bytes, or b"" if they are only skipped. Memory grows with what exists, not with `count`. Raises
    DataError where the stream ends early.
    """
    data, left = bytearray(), count
    while left:
        block = opened.read(min(left, _BLOCK_BYTES))
        if not block:
            raise DataError(f"{name}: ends {left:,} bytes before it should: it is truncated or changed; copy it again")
        if keep:
            data += block
        left -= len(block)
    return bytes(data)


def ids_of_bytes(data: bytes, options: ReadOptions) -> np.ndarray | str:
    """Ids of bytes that do not state their type: int64, or options.tokens_dtype."""
    dtype = np.dtype(options.tokens_dtype or "int64").newbyteorder("<")
    if len(data) % dtype.itemsize:
        return f"has {len(data):,} bytes, which are no {dtype.name} ids; give another --tokens-dtype"
    return np.frombuffer(data, dtype)


def are_ids(value: object) -> bool:
    """Whether a JSON value is a list of token ids."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_ID for item in value)


def ids_of_list(data: bytes) -> np.ndarray | str:
    """The ids of a JSON list, int64 [n], or what is wrong with it."""
    if len(data) > _MAX_JSON_BYTES:
        return (
            f"has {len(data):,} bytes of JSON, more than the {_MAX_JSON_BYTES:,} that a list of ids may take; split it"
        )
    try:
        value = parse_json(data)
    except ValueError as error:
        return f"is not JSON: {error}"
    if not are_ids(value):
        return "is not a list of token ids; each must be an integer from 0 on"
    return np.array(value, np.int64)


def choose_field(
    name: str, key: str | None, fields: Mapping[str, str], certain: Sequence[str], possible: Sequence[str]
) -> str:
    """The field of ids: `key`; else `tokens` or `input_ids`; else the only certain one. Raises DataError. fields: each
    with its encoding. possible: those whose encoding can hold ids.
    """
    have = ", ".join(f"{field} ({encoding})" for field, encoding in fields.items())
    if key is not None:
        if key not in fields:
            raise DataError(f"{name}: has no field '{key}' but {have}; name one with --tokens-key")
        return key
    chosen = [field for field in ("tokens", "input_ids") if field in possible] or list(certain)
    if len(chosen) != 1:
        problem = f"{', '.join(chosen)} could each hold the ids" if chosen else f"none of {have} is known to hold ids"
        raise DataError(f"{name}: {problem}: name the field with --tokens-key")
    return chosen[0]
