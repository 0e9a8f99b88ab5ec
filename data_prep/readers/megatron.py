"""Megatron's .bin of tokens and .idx that tells sequences and documents apart."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.plain_file import open_plain
from weftrain.data_prep.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.files import is_local
from weftrain.data_prep.read_options import ReadOptions
from weftrain.data_prep.readers.contract import Reader, Records

_MAX_ID = (1 << 31) - 1
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # DType codes of Megatron's indexed_dataset.py


@dataclass(frozen=True)
class _MegatronIndex:
    """dtype of the ids; sizes int32 [sequences] in ids, pointers int64 [sequences] in bytes; documents int64 [n + 1], first sequences."""

    dtype: np.dtype[Any]
    sizes: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray


def _megatron_index(file: InputFile) -> _MegatronIndex:
    """The index beside a .bin, held against both files' sizes. Raises DataError."""
    path = Path(file.address).with_suffix(".idx")
    try:
        if not is_local(file.address):
            raise ValueError("Megatron files are read from local folders only; copy them here first")
        with open_plain(path) as opened:
            data = opened.read()
        if data[:9] != _MEGATRON_MAGIC:
            raise ValueError("does not begin as a Megatron index does (MMIDIDX)")
        version, code, sequences, documents = struct.unpack_from("<QBQQ", data, 9)
        header = 9 + struct.calcsize("<QBQQ")
        if version != 1 or code not in _MEGATRON_TYPES:
            raise ValueError(f"has version {version} and type {code}; version 1 with integers is read")
        if len(data) != header + 12 * sequences + 8 * documents:
            raise ValueError(f"has {len(data):,} bytes, which {sequences:,} sequences and {documents:,} documents do not make")
        sizes = np.frombuffer(data, "<i4", sequences, header)
        pointers = np.frombuffer(data, "<i8", sequences, header + 4 * sequences)
        first = np.frombuffer(data, "<i8", documents, header + 12 * sequences)
        dtype = np.dtype(_MEGATRON_TYPES[code])
        if sequences and (
            sizes.min() < 0 or pointers.min() < 0 or int((pointers + sizes.astype(np.int64) * dtype.itemsize).max()) > file.num_bytes
        ):
            raise ValueError(f"points outside the {file.num_bytes:,} bytes of {Path(file.address).name}")
        if documents < 1 or first[0] != 0 or first[-1] != sequences or np.any(np.diff(first) < 0):
            raise ValueError(f"its documents do not rise from 0 to {sequences:,} sequences")
        return _MegatronIndex(dtype, sizes, pointers, first)
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"{path}: {error}; copy it again") from error


def megatron_documents(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """The documents that the index tells apart, each the sequences it is made of, joined."""
    table = _megatron_index(file)
    begin, end = share.begin, share.end if share.end != -1 else len(table.documents) - 1
    with open(file.address, "rb") as opened:
        for document in range(begin, end):
            pieces = []
            for sequence in range(int(table.documents[document]), int(table.documents[document + 1])):
                opened.seek(int(table.pointers[sequence]))
                pieces.append(np.frombuffer(opened.read(int(table.sizes[sequence]) * table.dtype.itemsize), table.dtype))
            tokens = np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, np.int64)
            if tokens.size and (tokens.min() < 0 or tokens.max() > _MAX_ID):
                yield Failure(index, document - begin, f"holds the id {tokens.min()} or {tokens.max()}, which is none")
            else:
                yield Document(index, document - begin, file.source, None, tokens.astype(np.int32))
    return end - begin


def _num_documents(file: InputFile) -> int:
    return len(_megatron_index(file).documents) - 1


READER = Reader(
    name="megatron",
    holds="tokens",
    read=megatron_documents,
    detect=lambda probe: probe.name.endswith(".bin") and probe.has_beside(".idx"),
    goes_with=lambda probe: probe.name.endswith(".idx") and probe.has_beside(".bin"),
    num_units=_num_documents,
    beside=lambda file: Path(file.address).with_suffix(".idx").read_bytes(),
)
