"""Reading token shards: mapped, and without trust. core/shard_format.py says what lies in them and writes them.

What a reader would get wrong: opening a shard checks all but the tokens; each block of these is checked against its digest, and against
the vocabulary, when it is first touched. No token is handed out before.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from weftrain.core.canonical import parse_json
from weftrain.core.errors import DataError
from weftrain.core.shard_format import (
    BLOCK_BYTES,
    FIM,
    FORMAT,
    FORMAT_2,
    ID_BYTES,
    INTEGERS,
    INTEGERS_2,
    OPTIONAL,
    PADDING,
    STRINGS,
    STRINGS_2,
    TABLES,
    Documents,
    FimRecord,
    ShardInfo,
    block_digest,
    contradiction,
    num_tokens,
    shard_digest,
    token_dtype,
    write_shard,
)
from weftrain.core.untrusted_hdf5 import HDF5_ERRORS, UntrustedFileError, open_dataset, read_attributes

__all__ = [
    "BLOCK_BYTES",
    "ID_BYTES",
    "PADDING",
    "Documents",
    "FimRecord",
    "ShardInfo",
    "ShardReader",
    "Stretch",
    "cumulative_lengths",
    "num_tokens",
    "token_dtype",
    "write_shard",
]

MAX_MAPPED = 256
_REMAKE = "remove the dataset and prepare it again"


class _Identity(NamedTuple):
    """What tells a file from another put in its place."""

    device: int
    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Stretch:
    """A document's part of one row: inputs first..last of the row (the label of the last input is in neither), and where it came from.

    source, file: lines of the dataset's `sources.jsonl` and `inputs.jsonl`, from 0; -1 for padding.
    """

    id: bytes
    source: int
    file: int
    record: int
    first: int
    last: int
    fim: tuple[int, ...] | None  # mode, a, b


class ShardReader:
    """A shard, checked and open for reading. Holds no HDF5 file where `data` is contiguous: the file is mapped when it is read.

    Raises DataError naming file, field and remedy: on opening for all but the tokens, on first touch for each block of these.
    access: 'mapped', or 'h5py' with the reason why not. source_names: of a shard of format 2, which holds them, else None.
    """

    def __init__(self, path: Path) -> None:
        shard = _open(path)
        self.path = path
        self.num_rows, self.sequence_length, self.row_stride, self.vocab_size = (int(shard.header[name]) for name in INTEGERS_2)
        self.num_sources = shard.documents.num_sources
        self.source_names = shard.source_names
        self.tokenizer_sha256: str = shard.header["tokenizer_sha256"]
        self.digest: str = shard.header["digest"]
        self._identity = shard.identity
        self._block_digest = shard.block_digest
        self._block_tokens = BLOCK_BYTES // shard.streams["data"].dtype.itemsize
        self._verified = np.zeros(len(shard.block_digest), dtype=np.bool_)
        self._unverified = len(shard.block_digest)  # how many blocks
        self._streams: dict[str, Any] = dict(shard.streams)
        self._file: h5py.File | None = shard.file
        chunked = next((stream for stream in shard.streams.values() if stream.chunks is not None), None)
        if chunked is not None:
            self.access = f"h5py ('{chunked.name[1:]}' is chunked, compression {chunked.compression or 'none'})"
        else:
            self.access = "mapped"
            self._streams = {name: (stream.dtype, stream.shape[0], stream.id.get_offset()) for name, stream in shard.streams.items()}
            self.close()

    def close(self) -> None:
        """Close the HDF5 file of a chunked shard, whose rows cannot be read after; a mapped shard has nothing to close."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n] row numbers -> int64 [n, sequence_length + 1] token ids. Raises IndexError, DataError."""
        self._touch(indices)
        return self._gather("data", indices).astype(np.int64)

    def read_into(self, ids: np.ndarray, places: Any, indices: np.ndarray) -> None:
        """ids[places] = rows(indices), with no copy between: int64 [m, sequence_length + 1], an index of n of its rows, int64 [n].

        For callers that know the indices to lie in the shard: they are not checked again. Raises DataError.
        """
        if self._unverified:
            self._touch(indices)
        ids[places] = self._gather("data", indices)

    @property
    def has_loss_mask(self) -> bool:
        return "loss_mask" in self._streams

    def loss_mask(self, indices: np.ndarray) -> np.ndarray | None:
        """int64 [n] row numbers -> bool [n, sequence_length], False where a label bears no loss; None where the shard has no mask."""
        if not self.has_loss_mask:
            return None
        self._touch(indices)
        return self._gather("loss_mask", indices)[:, 1:].astype(np.bool_)

    def verify(self) -> None:
        """Check every block now. Raises DataError for the first damaged one."""
        for block in np.flatnonzero(~self._verified).tolist():
            self._verify(block)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """data[start:stop], checked: with `documents`, a document's tokens."""
        for block in range(start // self._block_tokens, -(-stop // self._block_tokens)):
            if not self._verified[block]:
                self._verify(block)
        return self._slice("data", start, stop)

    def documents(self) -> Documents:
        """The document tables, read again: a reader does not keep them, since a large dataset has billions."""
        shard = _open(self.path)
        shard.file.close()
        if shard.header["digest"] != self.digest:
            raise _refusal(self.path, "digest", "changed since the shard was opened")
        return shard.documents

    def document_starts(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n] row numbers -> int32 [n, sequence_length]: for each input the index within its row of its document's first token.

        0 where the document began before the row. Raises IndexError, DataError.
        """
        self._touch(indices)
        ends = _document_ends(self.path, self.digest)
        first = indices * self.row_stride  # [n]
        stop = first + self.sequence_length
        low, high = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, stop - 1, side="right")
        counts = high - low + 1  # documents of each row
        row = np.repeat(np.arange(len(indices)), counts)
        document = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - low, counts)
        begins = np.where(document > 0, ends[document - 1], 0)
        begins = np.maximum(begins, first[row])
        lengths = np.minimum(ends[document], stop[row]) - begins
        return np.repeat((begins - first[row]).astype(np.int32), lengths).reshape(len(indices), self.sequence_length)

    def stretches(self, row: int) -> list[Stretch]:
        """The documents of a row's inputs, in order. Raises IndexError, DataError."""
        self._touch(np.array([row]))
        table, first = self.documents(), row * self.row_stride
        found = []
        for index in range(int(np.searchsorted(table.end, first, side="right")), len(table.end)):
            begin = int(table.end[index - 1]) if index else 0
            if begin >= first + self.sequence_length:
                break
            fim = (
                None if table.fim is None else (int(table.fim.mode[index]), int(table.fim.split[index, 0]), int(table.fim.split[index, 1]))
            )
            last = min(int(table.end[index]) - 1 - first, self.sequence_length - 1)
            place = (int(table.file[index]), int(table.record[index]))
            found.append(Stretch(table.id[index].tobytes(), int(table.source[index]), *place, max(begin - first, 0), last, fim))
        return found

    def _stream(self, name: str) -> Any:
        """`data` or `loss_mask`, [length]: an array over the mapped file, or the chunked dataset."""
        place = self._streams[name]
        if isinstance(place, h5py.Dataset):
            return place
        dtype, length, offset = place
        try:
            return np.frombuffer(_mapping(self.path, self._identity), dtype, length, offset)
        except (OSError, ValueError) as error:
            raise _refusal(self.path, "file", f"cannot be mapped: {_one_line(error)}") from error

    def _slice(self, name: str, start: int, stop: int) -> np.ndarray:
        try:
            return np.array(self._stream(name)[start:stop])
        except HDF5_ERRORS as error:
            raise _refusal(self.path, name, f"positions {start}..{stop} cannot be read: {_one_line(error)}") from error

    def _touch(self, indices: np.ndarray) -> None:
        """Verify every block that the rows reach into and that was not yet."""
        if not len(indices):
            return
        if not 0 <= int(indices.min()) <= int(indices.max()) < self.num_rows:
            raise IndexError(f"{self.path}: rows {indices.min()}..{indices.max()} of {self.num_rows}")
        if not self._unverified:
            return
        first = indices * self.row_stride
        spans = 1 + self.sequence_length // self._block_tokens
        for step in range(spans + 1):
            blocks = np.minimum(first + step * self._block_tokens, first + self.sequence_length) // self._block_tokens
            fresh = ~self._verified[blocks]
            if fresh.any():
                for block in np.unique(blocks[fresh]).tolist():
                    self._verify(block)

    def _verify(self, block: int) -> None:
        start, stop = block * self._block_tokens, (block + 1) * self._block_tokens
        data = self._slice("data", start, stop)
        mask = self._slice("loss_mask", start, stop) if "loss_mask" in self._streams else None
        first, last = max(0, start - self.sequence_length) // self.row_stride, min(self.num_rows - 1, (stop - 1) // self.row_stride)
        if block_digest(data, mask) != self._block_digest[block].tobytes():
            raise _refusal(
                self.path, "data", f"block {block} (rows {first}..{last}) does not hash to its digest, so it was altered or damaged"
            )
        if data.view(f"<u{data.itemsize}").max() >= self.vocab_size:  # as unsigned, a negative id is too large
            position = start + int(np.argmax(data.view(f"<u{data.itemsize}") >= self.vocab_size))
            row = min(position // self.row_stride, self.num_rows - 1)
            raise _refusal(
                self.path, "data", f"row {row} holds token id {data[position - start]}, beyond the vocabulary of {self.vocab_size}"
            )
        self._verified[block] = True
        self._unverified = int(np.count_nonzero(~self._verified))

    def _gather(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of a stream, in its own dtype: [n, sequence_length + 1]."""
        stream, width = self._stream(name), self.sequence_length + 1
        if isinstance(stream, np.ndarray):  # overlapping windows of it: num_tokens(rows) is its length, so the last one ends there
            strides = (self.row_stride * stream.itemsize, stream.itemsize)
            windows = np.ndarray((self.num_rows, width), stream.dtype, stream, 0, strides)  # type: ignore[arg-type]
            return windows[indices]
        rows = [self._slice(name, start, start + width) for start in (indices * self.row_stride).tolist()]
        return np.stack(rows) if rows else np.empty((0, width), stream.dtype)


@lru_cache(maxsize=64)  # 8 bytes a document: some 300 KB for a shard of 64 MiB of ordinary text
def _document_ends(path: Path, digest: str) -> np.ndarray:
    """A shard's `doc_end`, checked."""
    shard = _open(path)
    shard.file.close()
    if shard.header["digest"] != digest:
        raise _refusal(path, "digest", "changed since the shard was opened")
    shard.documents.end.flags.writeable = False
    return shard.documents.end


def cumulative_lengths(document_start: np.ndarray) -> np.ndarray:
    """int32 [rows, S] of `document_starts` -> int32 [documents + 1]: where each document's part begins in the flattened batch, and its end.

    The form that varlen attention kernels take as cu_seqlens. A row always begins a part, for attention does not cross rows.
    """
    positions = np.arange(document_start.shape[1], dtype=np.int32)
    begins = np.flatnonzero((document_start == positions).reshape(-1))
    return np.append(begins, document_start.size).astype(np.int32)


@dataclass(frozen=True)
class _OpenShard:
    """What `_open` has checked: all but the contents of `streams`, 'data' and perhaps 'loss_mask'."""

    file: h5py.File
    identity: _Identity
    header: dict[str, Any]
    documents: Documents
    source_names: tuple[str, ...] | None
    block_digest: np.ndarray
    streams: dict[str, h5py.Dataset]


def _open(path: Path) -> _OpenShard:
    """Open a shard's HDF5 file and check everything but the tokens. Raises DataError."""
    if not path.is_file():
        raise _refusal(path, "file", "is not a regular file" if path.exists() else "is missing")
    file: h5py.File | None = None
    try:
        identity = _identity(os.stat(path))
        file = h5py.File(path, "r", locking=False)
        return _checked(file, identity)
    except UntrustedFileError as error:
        refusal = _refusal(path, error.field, error.problem)
    except HDF5_ERRORS as error:
        refusal = _refusal(path, "file", f"cannot be read as HDF5: {_one_line(error)}")
    if file is not None:
        file.close()
    raise refusal


def _checked(file: h5py.File, identity: _Identity) -> _OpenShard:
    """Raises UntrustedFileError, or one of HDF5_ERRORS."""
    if file.userblock_size:
        raise UntrustedFileError("file", "has an HDF5 user block")
    if "data" not in file:
        raise UntrustedFileError("file", f"holds {sorted(file)[:8]}, no 'data'; is it a weftrain shard?")
    header = _header(file)
    links, required = set(file), {"data", *TABLES}
    if not required <= links <= required | OPTIONAL:
        raise UntrustedFileError("file", f"holds {sorted(links)[:12]}, not {sorted(required)}; is it a weftrain shard?")
    tables = {name: open_dataset(file, name, dtype, rank, identity.size)[...] for name, (dtype, rank) in TABLES.items()}
    fim = None
    if FIM in links:
        tables[FIM] = open_dataset(file, FIM, np.dtype("<i4"), 2, identity.size)[...]
        if tables[FIM].shape[1] != 3:
            raise UntrustedFileError(FIM, f"has shape {tables[FIM].shape}, not [n, 3]")
        fim = FimRecord(tables[FIM][:, 0], tables[FIM][:, 1:])
    names, num_sources, source = _sources(header, tables["doc_source"])
    documents = Documents(tables["doc_end"], tables["doc_id"], source, num_sources, tables["doc_file"], tables["doc_record"], fim)
    data = open_dataset(file, "data", token_dtype(header["vocab_size"]), 1, identity.size)
    streams = {"data": data}
    if "loss_mask" in links:
        streams["loss_mask"] = open_dataset(file, "loss_mask", np.dtype(np.uint8), 1, identity.size)
    if problem := contradiction(header, data.shape[0], documents):
        raise UntrustedFileError(*problem)
    if any(stream.shape != data.shape for stream in streams.values()):
        raise UntrustedFileError("loss_mask", f"has shape {streams['loss_mask'].shape}, 'data' has {data.shape}")
    digests = (-(-data.shape[0] * data.dtype.itemsize // BLOCK_BYTES), 32)
    if tables["block_digest"].shape != digests:
        raise UntrustedFileError("block_digest", f"has shape {tables['block_digest'].shape}, not {digests}")
    if shard_digest(header, tables, "loss_mask" in links) != header["digest"]:
        raise UntrustedFileError("digest", "attributes or tables do not hash to it, so the file was altered or damaged")
    return _OpenShard(file, identity, header, documents, names, tables["block_digest"], streams)


def _header(file: h5py.File) -> dict[str, Any]:
    """The attributes, of format 3 or 2. Raises UntrustedFileError."""
    former = "sources" in file.attrs
    header = read_attributes(file, INTEGERS_2, STRINGS_2) if former else read_attributes(file, INTEGERS, STRINGS)
    if header["format"].encode() != (FORMAT_2 if former else FORMAT):
        known = f"{FORMAT.decode()!r} and {FORMAT_2.decode()!r}"
        raise UntrustedFileError("format", f"is {header['format']!r}, which these attributes do not belong to; this program reads {known}")
    return header


def _sources(header: dict[str, Any], source: np.ndarray) -> tuple[tuple[str, ...] | None, int, np.ndarray]:
    """The names of a shard of format 2, how many sources there are, and `doc_source` as format 3 has it: -1 for padding."""
    if "sources" not in header:
        return None, header["num_sources"], source
    try:
        names = parse_json(header["sources"].encode())
    except ValueError as error:
        raise UntrustedFileError("sources", f"is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UntrustedFileError("sources", "is not a JSON list of strings")
    if source.size and (source.min() < 0 or source.max() >= len(names)):
        raise UntrustedFileError("doc_source", f"an index lies outside the {len(names)} sources")
    if names[-1:] == [PADDING]:
        names.pop()
    return tuple(names), len(names), np.where(source == len(names), np.int32(-1), source)


def _refusal(path: Path, field: str, problem: str) -> DataError:
    return DataError(f"{path}: {field}: {problem}; {_REMAKE}")


def _identity(status: os.stat_result) -> _Identity:
    return _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=MAX_MAPPED)
def _mapping(path: Path, identity: _Identity) -> mmap.mmap:
    """The whole file, read-only. Cached, and so bounded in number, because each holds a file descriptor."""
    with open(path, "rb") as file:
        if _identity(os.fstat(file.fileno())) != identity:
            raise ValueError("the file changed since it was opened")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
