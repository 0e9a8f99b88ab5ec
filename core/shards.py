"""The token-shard file: the one writer and the one reader.

HDF5, one rank-1 `data` (uint16 below 65,537 ids, else int32), contiguous and page-aligned, so that the reader asks HDF5 once where the
tokens lie and maps them. Row i is data[i * row_stride : i * row_stride + sequence_length + 1]: windows overlap by one id where the stride
is the sequence length (CrystalCoder), and not at all where it is one more (Amber), so the last row's last label is always there.

What a reader would get wrong: nothing in the file is believed. Links, virtual and external storage, sizes and attributes are checked when
it is opened, and each mebibyte of tokens against its SHA-256 and the vocabulary when it is first touched.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from weftrain.core import fsops
from weftrain.core.errors import DataError

FORMAT = "weftrain-shard"
VERSION = 1
DIGEST_BLOCK_BYTES = 1 << 20
PAGE_BYTES = 4096
DOCUMENT_ID_BYTES = 16
MAX_UINT16_VOCAB = 1 << 16
SIGNATURE = b"\x89HDF\r\n\x1a\n"
REMEDY = "prepare the dataset again, or restore the file from a copy"
_ARRAYS = {"data": 1, "doc_end": 1, "doc_id": 2, "doc_source": 1, "block_digest": 2}  # name -> rank; `loss_mask` is optional
_INTEGERS = ("version", "n_examples", "sequence_length", "row_stride", "vocab_size")
_STRINGS = ("format", "tokenizer_sha256", "source_names")


@dataclass(frozen=True)
class Documents:
    """The documents that end in a shard. end: int64 [n], one past each one's last token (its eos); id: uint8 [n, 16], the first half of
    the SHA-256 of its text; source: int32 [n], an index into source_names."""

    end: np.ndarray
    id: np.ndarray
    source: np.ndarray
    source_names: tuple[str, ...]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else int32."""
    return np.dtype("<u2" if vocab_size <= MAX_UINT16_VOCAB else "<i4")


def block_digests(tokens: np.ndarray) -> np.ndarray:
    """SHA-256 of each mebibyte of the array's bytes, uint8 [blocks, 32]."""
    data = memoryview(np.ascontiguousarray(tokens)).cast("B")
    digests = [hashlib.sha256(data[start : start + DIGEST_BLOCK_BYTES]).digest() for start in range(0, len(data), DIGEST_BLOCK_BYTES)]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def write_shard(
    path: Path,
    tokens: np.ndarray,
    documents: Documents,
    *,
    sequence_length: int,
    row_stride: int,
    vocab_size: int,
    tokenizer_sha256: str,
    loss_mask: np.ndarray | None = None,
) -> None:
    """Write a shard aside, sync it and rename it to `path`; the same arguments give the same bytes.

    tokens: integers [n_examples * row_stride + sequence_length + 1 - row_stride]; loss_mask: bool of that length or None, True where
    the id bears a loss as a label. Raises DataError for ids out of range, a length that is not whole rows, or a disk that is full.
    """
    examples, rest = divmod(len(tokens) - (sequence_length + 1 - row_stride), row_stride)
    if row_stride not in (sequence_length, sequence_length + 1) or rest or examples < 1:
        raise DataError(
            f"{path}: {len(tokens)} tokens are no whole rows of {sequence_length} + 1 with stride {row_stride}; pack them first"
        )
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise DataError(
            f"{path}: token id {int(tokens.max())} or {int(tokens.min())} lies outside 0..{vocab_size - 1}; check the tokenizer"
        )
    stored = np.ascontiguousarray(tokens, dtype=token_dtype(vocab_size))
    temporary = fsops.temporary_beside(path)
    try:
        with h5py.File(temporary, "w", libver="latest", alignment_threshold=PAGE_BYTES, alignment_interval=PAGE_BYTES) as file:
            arrays = {
                "data": stored,
                "doc_end": documents.end.astype("<i8"),
                "doc_id": documents.id.astype(np.uint8).reshape(-1, DOCUMENT_ID_BYTES),
                "doc_source": documents.source.astype("<i4"),
                "block_digest": block_digests(stored),
            }
            if loss_mask is not None:
                arrays["loss_mask"] = np.asarray(loss_mask, dtype=np.uint8)
            for name, array in arrays.items():
                file.create_dataset(name, data=array, track_times=False)
            integers = (VERSION, examples, sequence_length, row_stride, vocab_size)
            for name, value in zip(_INTEGERS, integers, strict=True):
                file.attrs[name] = np.int64(value)
            for name, text in zip(_STRINGS, (FORMAT, tokenizer_sha256, "\n".join(documents.source_names)), strict=True):
                file.attrs[name] = np.bytes_(text.encode())
        fsops.sync_file(temporary)
        fsops.rename(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror or error}; make room or choose another folder") from error


class Shard:
    """An open shard. Raises DataError, naming file, field and remedy, for whatever is not exactly a shard.

    Attributes: path, n_examples, sequence_length, row_stride, vocab_size, tokenizer_sha256, digests_sha256 (of the digest table: one
    hash that pins every token), access ('mapped', or 'h5py' for a chunked file).
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with _blamed(self.path):
            self._size = self._plausible_file()
            with h5py.File(self.path, "r", locking=False) as file:
                self._read_attributes(file)
                self._check_members(file)
                data = file["data"]
                self._dtype, self._length = data.dtype, data.shape[0]
                self._check_lengths(file)
                digests = file["block_digest"][()]
                self.digests_sha256 = hashlib.sha256(digests.tobytes()).hexdigest()
                self._digests = [row.tobytes() for row in digests]
                offset = data.id.get_offset()
                has_mask = "loss_mask" in file
                mask_offset = file["loss_mask"].id.get_offset() if has_mask else None
            self.access = "mapped" if offset is not None else "h5py"
            self._data = self._map(offset, self._dtype) if offset is not None else _Chunked(self.path)
            self._mask = self._map(mask_offset, np.dtype(np.uint8)) if has_mask else None
        self._verified = np.zeros(len(self._digests), dtype=bool)

    def __len__(self) -> int:
        return self.n_examples

    def __reduce__(self) -> tuple[type[Shard], tuple[Path]]:
        return Shard, (self.path,)

    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows by number -> int64 [rows, sequence_length + 1]. Raises DataError for damaged tokens, IndexError for a row beyond."""
        out = np.empty((len(indices), self.sequence_length + 1), dtype=np.int64)
        for slot, index in enumerate(indices):
            start = self._first(int(index))
            self._verify(start, start + self.sequence_length + 1, int(index))
            out[slot] = self._data[start : start + self.sequence_length + 1]
        return out

    def loss_mask(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """bool [rows, sequence_length], False where a label bears no loss; None where the shard has no mask."""
        if self._mask is None:
            return None
        starts = [self._first(int(index)) + 1 for index in indices]
        return np.stack([self._mask[start : start + self.sequence_length] != 0 for start in starts])

    def documents(self) -> Documents:
        """All documents that end in this shard, read anew."""
        with _blamed(self.path), h5py.File(self.path, "r", locking=False) as file:
            return Documents(file["doc_end"][()], file["doc_id"][()], file["doc_source"][()], self.source_names)

    def _first(self, index: int) -> int:
        if not 0 <= index < self.n_examples:
            raise IndexError(f"{self.path}: row {index} of {self.n_examples}")
        return index * self.row_stride

    def _verify(self, start: int, stop: int, row: int) -> None:
        """Hash and range-check the mebibytes that hold ids start..stop-1, each once."""
        item = self._dtype.itemsize
        first, last = start * item // DIGEST_BLOCK_BYTES, (stop * item - 1) // DIGEST_BLOCK_BYTES
        for block in range(first, last + 1):
            if self._verified[block]:
                continue
            per_block = DIGEST_BLOCK_BYTES // item
            ids = np.ascontiguousarray(self._data[block * per_block : (block + 1) * per_block])
            if hashlib.sha256(memoryview(ids).cast("B")).digest() != self._digests[block]:
                raise DataError(f"{self.path}: row {row}: token block {block} does not match its SHA-256; {REMEDY}")
            worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
            if not 0 <= worst < self.vocab_size:
                raise DataError(
                    f"{self.path}: row {row}: token id {worst} in block {block} lies outside 0..{self.vocab_size - 1}; {REMEDY}"
                )
            self._verified[block] = True

    def _plausible_file(self) -> int:
        with self.path.open("rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                raise ValueError("is not an HDF5 file")
            return os.fstat(file.fileno()).st_size

    def _read_attributes(self, file: h5py.File) -> None:
        values: dict[str, Any] = {}
        for name in (*_INTEGERS, *_STRINGS):
            if name not in file.attrs:
                raise ValueError(f"attribute '{name}' is missing")
            kind = file.attrs.get_id(name)
            if kind.shape != () or kind.dtype.kind != ("i" if name in _INTEGERS else "S"):
                raise ValueError(
                    f"attribute '{name}' is {kind.dtype} {kind.shape}, not a plain {'integer' if name in _INTEGERS else 'string'}"
                )
            value = file.attrs[name]
            values[name] = int(value) if name in _INTEGERS else bytes(value).decode()
        if values["format"] != FORMAT or values["version"] != VERSION:
            raise ValueError(f"is '{values['format'][:40]}' version {values['version']}, this program reads '{FORMAT}' version {VERSION}")
        self.n_examples, self.sequence_length = values["n_examples"], values["sequence_length"]
        self.row_stride, self.vocab_size = values["row_stride"], values["vocab_size"]
        self.tokenizer_sha256 = values["tokenizer_sha256"]
        self.source_names = tuple(values["source_names"].split("\n"))
        if self.sequence_length < 1 or self.row_stride not in (self.sequence_length, self.sequence_length + 1):
            raise ValueError(f"row_stride {self.row_stride} fits no sequence_length {self.sequence_length}")

    def _check_members(self, file: h5py.File) -> None:
        expected = dict(_ARRAYS) | ({"loss_mask": 1} if "loss_mask" in file else {})
        if set(file) != set(expected):
            raise ValueError(f"holds {sorted(file)[:8]}, not {sorted(expected)}")
        for name, rank in expected.items():
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"'{name}' is a link to somewhere else, which is not followed")
            dataset = file[name]
            if not isinstance(dataset, h5py.Dataset) or dataset.ndim != rank or dataset.dtype.kind not in "iu":
                raise ValueError(f"'{name}' is not an integer array of rank {rank}")
            plan = dataset.id.get_create_plist()
            layout = plan.get_layout()
            if layout == h5py.h5d.VIRTUAL or (layout != h5py.h5d.CHUNKED and plan.get_external_count()):
                raise ValueError(f"'{name}' keeps its values in other files, which are not read")
            if layout == h5py.h5d.CHUNKED and (name == "loss_mask" or dataset.compression not in (None, "gzip")):
                raise ValueError(f"'{name}' uses the filter {dataset.compression}; only gzip is read")
            if layout != h5py.h5d.CHUNKED and dataset.size:
                offset = dataset.id.get_offset()
                if layout == h5py.h5d.CONTIGUOUS and (offset is None or offset + dataset.nbytes > self._size):
                    raise ValueError(f"'{name}' declares {dataset.nbytes:,} bytes, the file has {self._size:,}")
            elif dataset.nbytes > self._size * 1100:  # gzip's best is 1032 : 1
                raise ValueError(f"'{name}' declares {dataset.nbytes:,} bytes, the file has {self._size:,}")

    def _check_lengths(self, file: h5py.File) -> None:
        if self._dtype != token_dtype(self.vocab_size):
            raise ValueError(f"'data' is {self._dtype}, a vocabulary of {self.vocab_size} needs {token_dtype(self.vocab_size)}")
        wanted = self.n_examples * self.row_stride + self.sequence_length + 1 - self.row_stride
        if self.n_examples < 1 or self._length != wanted:
            raise ValueError(f"n_examples {self.n_examples} needs {wanted} tokens, 'data' holds {self._length}")
        blocks = -(-self._length * self._dtype.itemsize // DIGEST_BLOCK_BYTES)
        documents = file["doc_end"].shape[0]
        shapes = {"block_digest": (blocks, 32), "doc_id": (documents, DOCUMENT_ID_BYTES), "doc_source": (documents,)}
        if "loss_mask" in file:
            shapes["loss_mask"] = (self._length,)
        for name, shape in shapes.items():
            if file[name].shape != shape:
                raise ValueError(f"'{name}' has shape {file[name].shape}, not {shape}")

    def _map(self, offset: int, dtype: np.dtype[Any]) -> np.memmap[Any, Any]:
        return np.memmap(self.path, dtype=dtype, mode="r", offset=offset, shape=(self._length,))


class _Chunked:
    """`data` of a chunked (compressed) file, read through h5py slice by slice; the file stays open."""

    def __init__(self, path: Path) -> None:
        self._file = h5py.File(path, "r", locking=False)
        self._data = self._file["data"]

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.asarray(self._data[part])


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Whatever HDF5 or a check says about this file, as a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard; {REMEDY}") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())[:300]
        raise DataError(f"{path}: {reason}; {REMEDY}") from error
