"""Rows and documents that others tokenised: Amber's JSON lines, Cerebras HDF5 in both forms, Megatron's .bin and .idx.

What a reader would get wrong: these files are read without trust. A size is held against the file before anything is allocated, HDF5 goes
through core/untrusted_hdf5.py, and ids are held against the vocabulary by the pipeline, which knows it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.plain_file import open_plain
from weftrain.core.untrusted_hdf5 import HDF5_ERRORS, UntrustedFileError, open_dataset
from weftrain.data_prep.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.input_files import is_local
from weftrain.data_prep.read_options import ReadOptions
from weftrain.data_prep.text_readers import Records, parse_object, read_lines

_MAX_ID = (1 << 31) - 1
_HDF5_ROWS = 256  # read at once
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # DType codes of Megatron's indexed_dataset.py


def amber_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """`{"token_ids": [sequence_length + 1 ints], "source": "c4"}` a line."""
    lines = read_lines(file, share)
    while True:
        try:
            number, line = next(lines)
        except StopIteration as stop:
            records: int = stop.value
            return records
        if line is not None and not line.strip():
            continue
        value = parse_object(line)
        if isinstance(value, str):
            yield Failure(index, number, value)
            continue
        ids, source = value.get("token_ids"), value.get("source", file.source)
        if not isinstance(ids, list) or not all(type(number_) is int and 0 <= number_ <= _MAX_ID for number_ in ids):
            yield Failure(index, number, "field 'token_ids' is not a list of token ids; each must be an integer from 0 on")
        elif (wrong := _wrong_length(len(ids), options)) is not None:
            yield Failure(index, number, wrong)
        elif not isinstance(source, str) or not source:
            yield Failure(index, number, "field 'source' is not a source's name")
        else:
            yield Document(index, number, source, None, np.array(ids, np.int32))


def _wrong_length(length: int, options: ReadOptions) -> str | None:
    if options.sequence_length is None or length == options.sequence_length + 1:
        return None
    return f"holds {length} token ids, not {options.sequence_length} + 1; give --sequence-length {length - 1} if all rows are so long"


def hdf5_format(address: str) -> Literal["cerebras", "cerebras_corpus"]:
    """Which of the two forms a file is: `data` of rank 3, or of rank 1. Raises DataError."""
    with _Hdf5(address) as data:
        return "cerebras" if data.ndim == 3 else "cerebras_corpus"


class _Hdf5:
    """`data` of an HDF5 file, checked: (N, 3, S) int32, or rank 1 of uint16, int32 or int64."""

    def __init__(self, address: str) -> None:
        if not is_local(address):
            raise DataError(f"{address}: HDF5 is read from local files only; copy it here first")
        self._address = address

    def __enter__(self) -> h5py.Dataset:
        problem = ""
        try:
            self._file = h5py.File(self._address, "r", locking=False)
        except HDF5_ERRORS as error:
            raise self._refusal(f"cannot be read as HDF5: {_one_line(error)}") from error
        try:
            size = os.stat(self._address).st_size
            if "data" not in self._file:
                raise UntrustedFileError("data", "is missing")
            for dtype, rank in (("<i4", 3), ("<u2", 1), ("<i4", 1), ("<i8", 1)):
                try:
                    data = open_dataset(self._file, "data", np.dtype(dtype), rank, size)
                except UntrustedFileError as error:
                    problem = str(error) if not problem or ("has type" not in str(error) and "has rank" not in str(error)) else problem
                    continue
                if rank == 3 and data.shape[1] != 3:
                    raise UntrustedFileError("data", f"has shape {data.shape}, not (N, 3, S)")
                count = self._file.attrs.get("n_examples")
                if rank == 3 and count is not None and int(count) != data.shape[0]:
                    raise UntrustedFileError("n_examples", f"is {int(count)}, 'data' has {data.shape[0]} rows")
                return data
            raise UntrustedFileError("data", problem.removeprefix("data: "))
        except UntrustedFileError as error:
            self._file.close()
            raise self._refusal(str(error)) from None
        except HDF5_ERRORS as error:
            self._file.close()
            raise self._refusal(f"cannot be read: {_one_line(error)}") from error

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _refusal(self, problem: str) -> DataError:
        return DataError(f"{self._address}: {problem}; copy it again, or name files with (N, 3, S) int32 or rank-1 'data'")


def cerebras_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """Rows of (N, 3, S): input ids, loss mask, labels that are the ids shifted by one."""
    with _Hdf5(file.address) as data:
        begin, end = share.begin, share.end if share.end != -1 else data.shape[0]
        if (wrong := _wrong_length(data.shape[2] + 1, options)) is not None:
            raise DataError(f"{file.address}: {wrong}")
        for first in range(begin, end, _HDF5_ROWS):
            rows = _read(file, data, first, min(first + _HDF5_ROWS, end))
            for offset, (ids, mask, labels) in enumerate(rows):
                number = first + offset - begin
                tokens = np.append(ids, labels[-1])
                if not np.array_equal(ids[1:], labels[:-1]):
                    place = int(np.argmax(ids[1:] != labels[:-1]))
                    yield Failure(
                        index, number, f"the label at {place} is {labels[place]}, the next id {ids[place + 1]}: not shifted by one"
                    )
                elif tokens.min() < 0 or mask.min() < 0 or mask.max() > 1:
                    yield Failure(index, number, "holds a negative id, or a loss mask other than 0 and 1")
                else:
                    whole = bool(mask.all())
                    yield Document(index, number, file.source, None, tokens, None if whole else np.append(True, mask.astype(np.bool_)))
    return end - begin


def corpus_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """Windows of sequence_length + 1 at stride sequence_length of rank-1 `data`; a tail that fills none is left out, as Cerebras does."""
    length = options.sequence_length
    assert length is not None
    with _Hdf5(file.address) as data:
        total = max(0, (data.shape[0] - 1) // length)
        begin, end = share.begin, share.end if share.end != -1 else total
        for first in range(begin, end, _HDF5_ROWS):
            last = min(first + _HDF5_ROWS, end)
            stream = _read(file, data, first * length, last * length + 1)
            for row in range(first, last):
                start = (row - first) * length
                tokens = stream[start : start + length + 1].astype(np.int64)
                if tokens.min() < 0 or tokens.max() > _MAX_ID:
                    yield Failure(index, row - begin, f"holds the id {tokens.min()} or {tokens.max()}, which is none")
                else:
                    yield Document(index, row - begin, file.source, None, tokens.astype(np.int32))
    return end - begin


def _read(file: InputFile, data: h5py.Dataset, begin: int, end: int) -> np.ndarray:
    try:
        return np.asarray(data[begin:end])
    except HDF5_ERRORS as error:
        raise DataError(f"{file.address}: data: {begin}..{end - 1} cannot be read: {_one_line(error)}; copy it again") from error


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


def num_records(file: InputFile) -> int:
    """Rows or documents of a file, in what its shares count; one for a corpus, whose rows depend on their length. Raises DataError."""
    if file.format == "megatron":
        return len(_megatron_index(file).documents) - 1
    if file.format == "cerebras":
        with _Hdf5(file.address) as data:
            return int(data.shape[0])
    return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
