"""The token-shard file: the one writer and the one reader. HDF5 that is mapped, and read without trust.

Rank-1 `data` holds the token stream; row i is data[i*row_stride : i*row_stride + sequence_length + 1], inputs and the label of the last
one. Rows of stride sequence_length share a token with the next row; rows of stride sequence_length + 1 are independent, as Amber's.

| dataset        | type                              | meaning                                                                   |
|----------------|-----------------------------------|---------------------------------------------------------------------------|
| `data`         | uint16 (vocab <= 65,536) or int32 | token ids, contiguous and page-aligned, so that they can be mapped        |
| `doc_end`      | int64 [documents]                 | one past each document's last token here; the last equals len(data)       |
| `doc_id`       | uint8 [documents, 16]             | head of the SHA-256 of the document's text                                |
| `doc_source`   | int32 [documents]                 | index into the attribute `sources`                                        |
| `loss_mask`    | uint8 [len(data)], optional       | 1 where the token, as a label, bears loss                                 |
| `block_digest` | uint8 [blocks, 32]                | SHA-256 of each 1 MiB of `data`, followed by its part of `loss_mask`      |

What a reader would get wrong: HDF5 checks none of this. It follows links out of the file, invents zeros for what is missing and lets a
flipped bit through. So everything but `data` is checked against the attribute `digest` when a shard is opened, and each block of `data`
against its digest, and against the vocabulary, when first touched. A document cut by a shard's end goes on in the next, under the same id.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from weftrain.core import fsops
from weftrain.core.canonical import canonical_json, parse_json
from weftrain.core.errors import DataError
from weftrain.core.untrusted_hdf5 import HDF5_ERRORS, UntrustedFileError, open_dataset, read_attributes

FORMAT = b"weftrain-shard/1"
BLOCK_BYTES = 1 << 20
ALIGNMENT = 4096
ID_BYTES = 16
MAX_MAPPED = 256
MAX_SOURCES_BYTES = 60_000  # an HDF5 attribute holds 64 KiB
_INTEGERS = ("n_examples", "sequence_length", "row_stride", "vocab_size")
_STRINGS = {"format": 64, "tokenizer_sha256": 64, "digest": 64, "sources": MAX_SOURCES_BYTES}  # attribute -> most bytes
_TABLES: dict[str, tuple[np.dtype[Any], int]] = {  # dataset -> (type, rank), in the digest's order
    "doc_end": (np.dtype("<i8"), 1),
    "doc_id": (np.dtype("|u1"), 2),
    "doc_source": (np.dtype("<i4"), 1),
    "block_digest": (np.dtype("|u1"), 2),
}
_REMAKE = "remove the dataset and prepare it again"


class _Identity(NamedTuple):
    """What tells a file from another put in its place."""

    device: int
    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Documents:
    """A shard's documents in order: end int64 [n], id uint8 [n, 16], source int32 [n], an index into `sources`."""

    end: np.ndarray
    id: np.ndarray
    source: np.ndarray
    sources: tuple[str, ...]


@dataclass(frozen=True)
class ShardInfo:
    """What was written. sha256: of the file. digest: the attribute, which commits to every token, document, mask and attribute."""

    num_bytes: int
    sha256: str
    digest: str
    num_rows: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else int32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def num_tokens(num_rows: int, sequence_length: int, row_stride: int) -> int:
    """Length of `data` for that many rows."""
    return (num_rows - 1) * row_stride + sequence_length + 1


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
) -> ShardInfo:
    """Write a shard atomically; equal arguments give equal bytes. The file is built in memory, so needs about twice its size there.

    tokens: integers [length], length = num_tokens(rows, ...) for some rows >= 1. loss_mask: bool or uint8 [length].
    Raises ValueError for arguments that contradict each other, DataError where the file cannot be written.
    """
    num_rows = 1 + (len(tokens) - sequence_length - 1) // row_stride
    header: dict[str, Any] = {
        "format": FORMAT.decode(),
        "n_examples": num_rows,
        "sequence_length": sequence_length,
        "row_stride": row_stride,
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "sources": canonical_json(documents.sources).decode(),
    }
    if problem := _contradiction(header, len(tokens), documents):
        raise ValueError(f"{path.name}: {problem[0]}: {problem[1]}")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(f"{path.name}: token ids {tokens.min()}..{tokens.max()} do not fit a vocabulary of {vocab_size}")
    data = np.ascontiguousarray(tokens, dtype=token_dtype(vocab_size))
    mask = None if loss_mask is None else np.ascontiguousarray(loss_mask, dtype=np.uint8)
    if mask is not None and (mask.shape != data.shape or mask.max() > 1):
        raise ValueError(f"{path.name}: loss_mask must be [{len(data)}] of 0 and 1")
    tables = {
        "doc_end": np.ascontiguousarray(documents.end, dtype="<i8"),
        "doc_id": np.ascontiguousarray(documents.id, dtype="|u1"),
        "doc_source": np.ascontiguousarray(documents.source, dtype="<i4"),
        "block_digest": _block_digests(data, mask),
    }
    header["digest"] = _digest(header, tables, mask is not None)
    image = _hdf5_image(header, {"data": data, **tables} | ({} if mask is None else {"loss_mask": mask}))
    try:
        fsops.write_bytes(path, image)
    except OSError as error:
        raise DataError(f"{path}: the shard cannot be written: {error.strerror}; free space or choose another folder") from error
    return ShardInfo(len(image), hashlib.sha256(image).hexdigest(), header["digest"], num_rows)


def _hdf5_image(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """The file's bytes, made in memory: then writing is one atomic operation whose errors are the operating system's own."""
    settings = {"libver": "latest", "alignment_threshold": ALIGNMENT, "alignment_interval": ALIGNMENT}
    block_size = max(1 << 16, arrays["data"].nbytes)
    with h5py.File("shard", "w", driver="core", backing_store=False, block_size=block_size, **settings) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)
        for name, value in header.items():
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else np.int64(value)
        file.flush()
        return bytes(file.id.get_file_image())


def _block_digests(data: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    step = BLOCK_BYTES // data.itemsize
    digests = [_block_digest(data[at : at + step], None if mask is None else mask[at : at + step]) for at in range(0, len(data), step)]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def _block_digest(data: np.ndarray, mask: np.ndarray | None) -> bytes:
    digest = hashlib.sha256(data.data)
    if mask is not None:
        digest.update(mask.data)
    return digest.digest()


def _digest(header: dict[str, Any], tables: dict[str, np.ndarray], has_mask: bool) -> str:
    """SHA-256 over the attributes and each table, lengths first; through `block_digest` it commits to the tokens."""
    fields = {name: value for name, value in header.items() if name != "digest"}
    shapes = {name: list(tables[name].shape) for name in _TABLES}
    digest = hashlib.sha256(canonical_json({"attributes": fields, "tables": shapes, "loss_mask": has_mask}))
    for name in _TABLES:
        digest.update(np.ascontiguousarray(tables[name]).data)
    return digest.hexdigest()


def _contradiction(header: dict[str, Any], length: int, documents: Documents) -> tuple[str, str] | None:
    """The first (field, problem) between attributes, length and documents, or None."""
    rows, sequence_length, stride = header["n_examples"], header["sequence_length"], header["row_stride"]
    if sequence_length < 1 or stride not in (sequence_length, sequence_length + 1):
        return "row_stride", f"{stride} is neither sequence_length ({sequence_length}) nor one more"
    if not 1 <= header["vocab_size"] <= 1 << 31:
        return "vocab_size", f"{header['vocab_size']} lies outside 1..2^31"
    if rows < 1 or num_tokens(rows, sequence_length, stride) != length:
        return "n_examples", f"{rows} rows of {sequence_length} + 1 tokens at stride {stride} are not the {length} tokens of 'data'"
    end, source = documents.end, documents.source
    if end.ndim != 1 or documents.id.shape != (len(end), ID_BYTES) or source.shape != (len(end),):
        return (
            "doc_end",
            f"doc_end, doc_id, doc_source have shapes {end.shape}, {documents.id.shape}, {source.shape}, not [n], [n, 16], [n]",
        )
    if len(end) == 0 or end[0] < 1 or end[-1] != length or np.any(np.diff(end) < 1):
        return "doc_end", f"document ends do not rise from 1 to {length}"
    if source.min() < 0 or source.max() >= len(documents.sources):
        return "doc_source", f"an index lies outside the {len(documents.sources)} sources"
    if len(header["sources"].encode()) > MAX_SOURCES_BYTES:
        return "sources", f"the sources' names exceed {MAX_SOURCES_BYTES} bytes"
    return None


class ShardReader:
    """A shard, checked and open for reading. Holds no HDF5 file where `data` is contiguous: the file is mapped when it is read.

    Raises DataError naming file, field and remedy: on opening for all but the tokens, on first touch for each block of these.
    access: 'mapped', or 'h5py' with the reason why not.
    """

    def __init__(self, path: Path) -> None:
        shard = _open(path)
        self.path = path
        self.num_rows, self.sequence_length, self.row_stride, self.vocab_size = (int(shard.header[name]) for name in _INTEGERS)
        self.tokenizer_sha256: str = shard.header["tokenizer_sha256"]
        self.digest: str = shard.header["digest"]
        self._identity = shard.identity
        self._block_digest = shard.block_digest
        self._block_tokens = BLOCK_BYTES // shard.streams["data"].dtype.itemsize
        self._verified = np.zeros(len(shard.block_digest), dtype=np.bool_)
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

    def loss_mask(self, indices: np.ndarray) -> np.ndarray | None:
        """int64 [n] row numbers -> bool [n, sequence_length], False where a label bears no loss; None where the shard has no mask."""
        if "loss_mask" not in self._streams:
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
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_rows:
            raise IndexError(f"{self.path}: rows {indices.min()}..{indices.max()} of {self.num_rows}")
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
        if _block_digest(data, mask) != self._block_digest[block].tobytes():
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

    def _gather(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of a stream, in its own dtype: [n, sequence_length + 1]."""
        stream, width = self._stream(name), self.sequence_length + 1
        if isinstance(stream, np.ndarray):
            windows = np.lib.stride_tricks.sliding_window_view(stream, width)[:: self.row_stride]
            return windows[indices]
        rows = [self._slice(name, start, start + width) for start in (indices * self.row_stride).tolist()]
        return np.stack(rows) if rows else np.empty((0, width), stream.dtype)


@dataclass(frozen=True)
class _OpenShard:
    """What `_open` has checked: all but the contents of `streams`, 'data' and perhaps 'loss_mask'."""

    file: h5py.File
    identity: _Identity
    header: dict[str, Any]
    documents: Documents
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
    links, required = set(file), {"data", *_TABLES}
    if not required <= links <= required | {"loss_mask"}:
        raise UntrustedFileError("file", f"holds {sorted(links)[:8]}, not {sorted(required)}; is it a weftrain shard?")
    header = read_attributes(file, _INTEGERS, _STRINGS)
    if header["format"].encode() != FORMAT:
        raise UntrustedFileError("format", f"is {header['format']!r}, this program reads {FORMAT.decode()!r}")
    tables = {name: open_dataset(file, name, dtype, rank, identity.size)[...] for name, (dtype, rank) in _TABLES.items()}
    documents = Documents(tables["doc_end"], tables["doc_id"], tables["doc_source"], _source_names(header["sources"]))
    data = open_dataset(file, "data", token_dtype(header["vocab_size"]), 1, identity.size)
    streams = {"data": data}
    if "loss_mask" in links:
        streams["loss_mask"] = open_dataset(file, "loss_mask", np.dtype(np.uint8), 1, identity.size)
    if problem := _contradiction(header, data.shape[0], documents):
        raise UntrustedFileError(*problem)
    if any(stream.shape != data.shape for stream in streams.values()):
        raise UntrustedFileError("loss_mask", f"has shape {streams['loss_mask'].shape}, 'data' has {data.shape}")
    digests = (-(-data.shape[0] * data.dtype.itemsize // BLOCK_BYTES), 32)
    if tables["block_digest"].shape != digests:
        raise UntrustedFileError("block_digest", f"has shape {tables['block_digest'].shape}, not {digests}")
    if _digest(header, tables, "loss_mask" in links) != header["digest"]:
        raise UntrustedFileError("digest", "attributes or tables do not hash to it, so the file was altered or damaged")
    return _OpenShard(file, identity, header, documents, tables["block_digest"], streams)


def _source_names(text: str) -> tuple[str, ...]:
    try:
        names = parse_json(text.encode())
    except ValueError as error:
        raise UntrustedFileError("sources", f"is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UntrustedFileError("sources", "is not a JSON list of strings")
    return tuple(names)


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
