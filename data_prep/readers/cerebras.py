"""Cerebras HDF5 in both forms: rows of (N, 3, S), and a "corpus" of rank 1. Read without trust, through core/untrusted_hdf5.py."""

from __future__ import annotations

import os

import h5py
import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.untrusted_hdf5 import HDF5_ERRORS, UntrustedFileError, open_dataset
from weftrain.data_prep.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.files import is_local
from weftrain.data_prep.read_options import ReadOptions
from weftrain.data_prep.readers.contract import Probe, Reader, Records, one_line, wrong_length

_MAX_ID = (1 << 31) - 1
_HDF5_ROWS = 256  # read at once


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
            raise self._refusal(f"cannot be read as HDF5: {one_line(error)}") from error
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
            raise self._refusal(f"cannot be read: {one_line(error)}") from error

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _refusal(self, problem: str) -> DataError:
        return DataError(f"{self._address}: {problem}; copy it again, or name files with (N, 3, S) int32 or rank-1 'data'")


def cerebras_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """Rows of (N, 3, S): input ids, loss mask, labels that are the ids shifted by one."""
    with _Hdf5(file.address) as data:
        begin, end = share.begin, share.end if share.end != -1 else data.shape[0]
        if (wrong := wrong_length(data.shape[2] + 1, options)) is not None:
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
        raise DataError(f"{file.address}: data: {begin}..{end - 1} cannot be read: {one_line(error)}; copy it again") from error


def _num_rows(file: InputFile) -> int:
    with _Hdf5(file.address) as data:
        return int(data.shape[0])


def _rank(probe: Probe) -> int | None:
    """The rank of `data`; None for a file that is not named as HDF5. Raises DataError."""
    if not probe.plain_name.endswith((".h5", ".hdf5")):
        return None
    with _Hdf5(probe.address) as data:
        return int(data.ndim)


ROWS = Reader(name="cerebras", holds="rows", read=cerebras_rows, detect=lambda probe: _rank(probe) == 3, num_units=_num_rows)
# One unit, since how many rows there are depends on their length.
CORPUS = Reader(name="cerebras_corpus", holds="rows", read=corpus_rows, detect=lambda probe: _rank(probe) == 1)
