"""Cerebras HDF5: rows of (N, 3, S), packed rows of variable lengths (N, 5, S), and a "corpus" of rank 1.

The planes are input ids, loss mask, labels, and in (N, 5, S) attention_span and position_ids, as the Model Zoo's
data_preprocessing writes them. A row becomes the S + 1 ids whose inputs and labels are the planes':

- Padding is the end of a row where no label bears loss, and ids and labels are all one id.
- Before it, every label that bears loss must be the next id. Where a label bears none, the ids stand unchecked.
- The last label before the padding is kept: it is the text's last token, where the input ids already have padding. No
  loss depends on the padding id that it replaces.
- In (N, 5, S) a document begins where position_ids is 0, and attention_span falls to 0 where it ends. If both planes
  are all zeros, they separate no documents.

The files are read without trust, through core/formats/hdf5.py.
"""

from __future__ import annotations

import os

import h5py
import numpy as np

from weftrain.core.errors import DataError, one_line
from weftrain.core.formats.hdf5 import HDF5_ERRORS, UntrustedFileError, open_dataset
from weftrain.data_prep.inputs.files import is_local
from weftrain.data_prep.marks import BEGINS, LOSS, PADDING
from weftrain.data_prep.readers.contract import Probe, Reader, Records, wrong_length
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.ids import MAX_ID, ids_document
from weftrain.data_prep.readers.read_options import ReadOptions

_READ_BYTES = 8 << 20  # of rows, read at once
_FORMS = tuple((dtype, rank) for rank in (3, 1) for dtype in ("<i4", "<u2", "<u4", "<i8"))
_PLANES = (3, 5)


class _Hdf5:
    """`data` of an HDF5 file, checked: (N, 3, S), (N, 5, S) or rank 1, of uint16, int32, uint32 or int64."""

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
            for dtype, rank in _FORMS:
                try:
                    data = open_dataset(self._file, "data", np.dtype(dtype), rank, size)
                except UntrustedFileError as error:
                    problem = (
                        str(error)
                        if not problem or ("has type" not in str(error) and "has rank" not in str(error))
                        else problem
                    )
                    continue
                if rank == 3 and data.shape[1] not in _PLANES:
                    raise UntrustedFileError("data", f"has shape {data.shape}, not (N, 3, S) or (N, 5, S)")
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
        return DataError(
            f"{self._address}: {problem}; copy it again, or name files with integer 'data' of (N, 3, S), (N, 5, S) or "
            "of one dimension"
        )


def cerebras_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    with _Hdf5(file.address) as data:
        begin, end = share.bounds(data.shape[0])
        if (wrong := wrong_length(data.shape[2] + 1, options)) is not None:
            raise DataError(f"{file.address}: {wrong}")
        step = max(1, _READ_BYTES // max(1, data.dtype.itemsize * data.shape[1] * data.shape[2]))
        for first in range(begin, end, step):
            for offset, planes in enumerate(_read(file, data, first, min(first + step, end))):
                number = first + offset - begin
                row = _row(planes.astype(np.int64))
                if isinstance(row, str):
                    yield Failure(index, number, row)
                else:
                    tokens, marks = row
                    yield Document(index, number, file.source, None, tokens, marks)
    return end - begin


def _row(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray | None] | str:
    """Planes int64 [3 or 5, S] -> ids int32 [S + 1] and marks (None: every token bears loss); or what is wrong."""
    ids, mask, labels = planes[:3]
    if mask.min() < 0 or mask.max() > 1:
        return "holds a loss mask other than 0 and 1"
    bears = mask == 1
    if not bears.any() and (ids[1:] != ids[-1]).any():
        return "bears no loss anywhere, and is no padding either; a mask that is inverted (inverted_mask) is not read"
    text = _text_length(planes)
    wrong = bears[:-1] & (ids[1:] != labels[:-1])
    if wrong[: max(0, text - 1)].any():
        place = int(np.argmax(wrong))
        return f"the label at {place} is {labels[place]}, the next id {ids[place + 1]}: not shifted by one"
    tokens = np.append(ids, ids[-1])
    if text and (bears[text - 1] or labels[text - 1] >= 0):
        tokens[text] = labels[text - 1]
    if tokens.min() < 0 or tokens.max() > MAX_ID:
        return f"holds ids {tokens.min()}..{tokens.max()}, and each must be one of 0..{MAX_ID}; repair it"
    begins = _begins(planes, text) if len(planes) > 3 else None
    if isinstance(begins, str):
        return begins
    if bears.all() and begins is None:
        return tokens.astype(np.int32), None
    marks = np.append(True, bears) * np.uint8(LOSS)
    marks[text + 1 :] |= PADDING
    if begins is not None:
        marks[begins] |= BEGINS
    return tokens.astype(np.int32), marks.astype(np.uint8)


def _text_length(planes: np.ndarray) -> int:
    """The number of a row's inputs before its padding."""
    ids, mask, labels = planes[:3]
    padding = (mask == 0) & (ids == ids[-1]) & (labels == ids[-1]) & (planes[3:] == 0).all(axis=0)
    return len(ids) - int(np.argmin(padding[::-1])) if not padding.all() else 0


def _begins(planes: np.ndarray, text: int) -> np.ndarray | str | None:
    """Where documents begin; None where the planes separate none; or what is wrong with them."""
    span, position = planes[3, :text], planes[4, :text]
    if not text or not (span.any() or position.any()):
        return None
    begins = np.flatnonzero(position == 0)
    if not len(begins) or begins[0]:
        return f"position_ids begin with {position[0]}, not 0"
    lengths = np.diff(np.append(begins, text))
    inside = np.arange(text) - np.repeat(begins, lengths)
    if (position != inside).any() or (span != np.repeat(lengths, lengths) - 1 - inside).any():
        place = int(np.argmax((position != inside) | (span != np.repeat(lengths, lengths) - 1 - inside)))
        return f"position_ids and attention_span contradict each other at {place} ({position[place]} and {span[place]})"
    return begins


def corpus_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """Windows of sequence_length + 1 at stride sequence_length; an incomplete tail is left out, as Cerebras does."""
    length = options.sequence_length
    assert length is not None
    with _Hdf5(file.address) as data:
        total = max(0, (data.shape[0] - 1) // length)
        begin, end = share.bounds(total)
        step = max(1, _READ_BYTES // (data.dtype.itemsize * length))
        for first in range(begin, end, step):
            last = min(first + step, end)
            stream = _read(file, data, first * length, last * length + 1)
            for row in range(first, last):
                start = (row - first) * length
                yield ids_document(index, row - begin, file.source, stream[start : start + length + 1])
    return end - begin


def _read(file: InputFile, data: h5py.Dataset, begin: int, end: int) -> np.ndarray:
    try:
        return np.asarray(data[begin:end])
    except HDF5_ERRORS as error:
        raise DataError(
            f"{file.address}: data: {begin}..{end - 1} cannot be read: {one_line(error)}; copy it again"
        ) from error


def _num_rows(file: InputFile) -> int:
    with _Hdf5(file.address) as data:
        return int(data.shape[0])


def _rank(probe: Probe) -> int | None:
    """The rank of `data`; None for a file not named as HDF5. Raises DataError."""
    if not probe.plain_name.endswith((".h5", ".hdf5")):
        return None
    with _Hdf5(probe.address) as data:
        return int(data.ndim)


ROWS = Reader(
    name="cerebras", holds="rows", read=cerebras_rows, detect=lambda probe: _rank(probe) == 3, num_units=_num_rows
)
# One unit, since how many rows there are depends on their length.
CORPUS = Reader(name="cerebras_corpus", holds="rows", read=corpus_rows, detect=lambda probe: _rank(probe) == 1)
READERS = (ROWS, CORPUS)
