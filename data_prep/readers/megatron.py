"""Megatron's .bin of ids and .idx of sequences and documents (version 1, `indexed_dataset.py` of Megatron-LM).

The index is never in memory as a whole: a share reads, and checks against the .bin's size, only what it needs.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from weftrain.core.errors import DataError, file_problem
from weftrain.core.formats.plain_file import open_plain
from weftrain.data_prep.readers.contract import Probe, Reader, Records, local_only, with_suffix
from weftrain.data_prep.readers.documents import InputFile, Share
from weftrain.data_prep.readers.ids import MAX_DOCUMENT_IDS, TABLE_ROWS, ids_document, read_array, too_long
from weftrain.data_prep.readers.read_options import ReadOptions

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, sequences, documents + 1
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_SIZE, _POINTER, _MODE = np.dtype("<i4"), np.dtype("<i8"), np.dtype("<i1")


@dataclass(frozen=True)
class _Index:
    """An opened .idx: sizes int32 and pointers int64 (bytes) of sequences, first int64 [documents + 1] sequences."""

    opened: IO[bytes]
    path: str
    dtype: np.dtype[Any]
    sequences: int
    documents: int
    bin_bytes: int

    def sizes(self, begin: int, end: int) -> np.ndarray:
        return read_array(self.opened, self.path, _HEADER.size + 4 * begin, end - begin, _SIZE)

    def pointers(self, begin: int, end: int) -> np.ndarray:
        return read_array(self.opened, self.path, _HEADER.size + 4 * self.sequences + 8 * begin, end - begin, _POINTER)

    def first(self, begin: int, end: int) -> np.ndarray:
        return read_array(self.opened, self.path, _HEADER.size + 12 * self.sequences + 8 * begin, end - begin, _POINTER)

    def refusal(self, problem: str) -> DataError:
        return DataError(f"{self.path}: {problem}; copy it again")


def _open_index(file: InputFile) -> _Index:
    """The index beside a .bin, its header checked against both files' sizes. Raises DataError."""
    path = with_suffix(file.address, ".idx")
    local_only(file.address, "Megatron files")
    try:
        opened = open_plain(Path(path))
    except OSError as error:
        raise DataError(f"{path}: {file_problem(error)}; a Megatron .bin needs its index beside it") from error
    try:
        return _checked(opened, path, file)
    except (OSError, ValueError) as error:
        opened.close()
        raise DataError(f"{path}: {error}; copy it again") from error


def _checked(opened: IO[bytes], path: str, file: InputFile) -> _Index:
    header = opened.read(_HEADER.size)
    if header[:9] != _MAGIC:
        raise ValueError("does not begin as a Megatron index does (MMIDIDX)")
    if len(header) < _HEADER.size:
        raise ValueError("ends within its header")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code in _FLOATS or code not in _TYPES:
        kind = _FLOATS.get(code, f"type {code}")
        raise ValueError(f"has version {version} and {kind}; version 1 with integers is read")
    num_bytes = os.fstat(opened.fileno()).st_size
    tables = _HEADER.size + 12 * sequences + 8 * boundaries
    if num_bytes not in (tables, tables + sequences) or not boundaries:
        raise ValueError(
            f"has {num_bytes:,} bytes, which {sequences:,} sequences and {boundaries:,} documents do not make"
        )
    index = _Index(opened, path, np.dtype(_TYPES[code]), sequences, boundaries - 1, file.num_bytes)
    if num_bytes != tables:  # multimodal: a mode a sequence
        for begin in range(0, sequences, TABLE_ROWS):
            if read_array(opened, path, tables + begin, min(TABLE_ROWS, sequences - begin), _MODE).any():
                raise ValueError("is multimodal: it has sequences of a mode other than 0, which are no text")
    if index.first(0, 1)[0] != 0 or index.first(boundaries - 1, boundaries)[0] != sequences:
        raise ValueError(f"its documents do not rise from 0 to {sequences:,} sequences")
    return index


def megatron_documents(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    table = _open_index(file)
    with table.opened, open(file.address, "rb") as opened:
        begin, end = share.bounds(table.documents)
        for first in range(begin, end, TABLE_ROWS):
            bounds = table.first(first, min(first + TABLE_ROWS, end) + 1).tolist()
            if (
                bounds[0] < 0
                or bounds[-1] > table.sequences
                or any(low > high for low, high in itertools.pairwise(bounds))
            ):
                raise table.refusal(f"its documents do not rise from 0 to {table.sequences:,} sequences")
            for number, (low, high) in enumerate(itertools.pairwise(bounds), start=first - begin):
                pieces, length = [], 0
                for size, pointer in _sequences(table, low, high):
                    length += size
                    if length <= MAX_DOCUMENT_IDS:
                        pieces.append(read_array(opened, file.address, pointer, size, table.dtype))
                if length > MAX_DOCUMENT_IDS:
                    yield too_long(index, number, length)
                else:
                    yield ids_document(
                        index, number, file.source, np.concatenate(pieces) if pieces else np.empty(0, table.dtype)
                    )
    return end - begin


def _sequences(table: _Index, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(size in ids, position in bytes) of sequences begin..end-1 of the .bin. Raises DataError."""
    for first in range(begin, end, TABLE_ROWS):
        last = min(first + TABLE_ROWS, end)
        sizes, pointers = table.sizes(first, last), table.pointers(first, last)
        room = (table.bin_bytes - pointers) // table.dtype.itemsize  # below 0 for a pointer behind the end
        if sizes.min() < 0 or pointers.min() < 0 or (sizes > room).any():
            raise table.refusal(f"points outside the {table.bin_bytes:,} bytes of the .bin beside it")
        yield from zip(sizes.tolist(), pointers.tolist(), strict=True)


def _num_documents(file: InputFile) -> int:
    table = _open_index(file)
    table.opened.close()
    return table.documents


def _is_bin(probe: Probe) -> bool:
    """Whether a .bin has its index beside it. Raises DataError for a remote one, which would need many small reads."""
    if not probe.name.endswith(".bin") or not probe.has_beside(".idx"):
        return False
    local_only(probe.address, "Megatron files")
    return True


READERS = (
    Reader(
        name="megatron",
        holds="tokens",
        read=megatron_documents,
        detect=_is_bin,
        goes_with=lambda probe: probe.name.endswith(".idx") and probe.has_beside(".bin"),
        num_units=_num_documents,
        beside=lambda file: (with_suffix(file.address, ".idx"),),
    ),
)
