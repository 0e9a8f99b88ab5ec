"""Reading token shards through memory maps and without trust. core/formats/shard_format.py describes and writes them.

Opening a shard checks everything but the tokens (core/formats/shard_file.py). Each block of tokens is checked against
its digest and the vocabulary at its first access, before any of it is returned. `read_rows` gathers rows from any
number of shards; all other row reading builds on it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.formats.shard_file import MappedStreams, open_shard, refusal, streams_of
from weftrain.core.formats.shard_format import (
    BLOCK_BYTES,
    INTEGERS_2,
    LOSS_MASK,
    PLANES,
    TOKEN_WEIGHTS,
    Documents,
    block_digest,
    weights_problem,
)

_GATHERED_ROWS = 64  # at a time, and so many files may be mapped at once beyond MAX_MAPPED
_GATHERED_TOKENS = 1 << 18  # at a time: they stay in the processor's cache until they are widened to int64
_TOKENS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<i4")}  # by itemsize
_THREADED_BLOCKS = 4  # a block takes half a millisecond, about as long as a few threads take to start
_MAX_THREADS = 16  # of each process that reads, of which a machine may have several


@dataclass(frozen=True)
class DocumentSpan:
    """A document's part of one row: its inputs first..last, without the label of the last; and where it came from.

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
    """A shard, checked and open for reading.

    Raises DataError naming file, field and remedy: at opening for all but the tokens, at first access for each block of
    tokens. access: 'mapped', or 'h5py' with the reason. source_names: those that a shard of format 2 holds, else None.
    """

    def __init__(self, path: Path) -> None:
        shard = open_shard(path)
        self.path = path
        self.num_rows, self.sequence_length, self.row_stride, self.vocab_size = (
            int(shard.header[name]) for name in INTEGERS_2
        )
        self.num_sources = shard.documents.num_sources
        self.source_names = shard.source_names
        self.tokenizer_sha256: str = shard.header["tokenizer_sha256"]
        self.digest: str = shard.header["digest"]
        self.dtype: np.dtype[Any] = shard.streams["data"].dtype
        self.planes = tuple(name for name in PLANES if name in shard.streams)
        self._num_tokens = int(shard.streams["data"].shape[0])
        self._block_digest = shard.block_digest
        self._block_tokens = BLOCK_BYTES // self.dtype.itemsize
        # bytes; 0: there is no such stream
        self.itemsizes = {"data": self.dtype.itemsize}
        self.itemsizes |= {name: PLANES[name].stored.itemsize * (name in self.planes) for name in PLANES}
        self._verified = bytearray(len(shard.block_digest))  # a byte for each block: 1 once it was verified
        self.is_verified = False  # every block
        self.streams = streams_of(path, shard.file, shard.identity, shard.streams | {"doc_end": shard.file["doc_end"]})
        self.access = self.streams.access

    def close(self) -> None:
        """Close the HDF5 file of a chunked shard, which then cannot be read. A mapped shard has nothing to close."""
        self.streams.close()

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n] row numbers -> int64 [n, sequence_length + 1] token ids. Raises IndexError, DataError."""
        ids = np.empty((len(indices), self.sequence_length + 1), dtype=np.int64)
        positions = self._positions(indices)
        read_rows(ids, [self] * len(positions), positions)
        return ids

    def plane(self, name: str, indices: np.ndarray) -> np.ndarray | None:
        """int64 [n] row numbers -> [n, sequence_length], a plane of PLANES, a value for each label; None if the shard
        does not have it.
        """
        if name not in self.planes:
            return None
        found = np.empty((len(indices), self.sequence_length), PLANES[name].read)
        positions = self._positions(indices)
        readers = [self] * len(positions)
        _verify({self}, readers, positions)
        _gather(found, name, {self}, readers, positions)
        return found

    def verify(self) -> None:
        """Check every block now. Raises DataError for the first damaged one."""
        for block in range(len(self._verified)):
            self.verify_block(block)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """data[start:stop], checked: with `documents`, a document's tokens."""
        for block in self.unverified(start, stop):
            self.verify_block(block)
        return self._slice("data", start, stop).copy()

    def plane_of_tokens(self, name: str, start: int, stop: int) -> np.ndarray:
        """A plane of PLANES for data[start:stop], checked: `absent` where the shard does not have it."""
        if name not in self.planes:
            return np.full(stop - start, PLANES[name].absent, PLANES[name].read)
        for block in self.unverified(start, stop):
            self.verify_block(block)
        return self._slice(name, start, stop).astype(PLANES[name].read)

    def documents(self) -> Documents:
        """The document tables, read again: a reader does not keep them, since a large dataset has billions."""
        return _documents(self.path, self.digest)

    def document_starts(self, indices: np.ndarray) -> np.ndarray:
        """`read_document_starts` of these rows, int64 [n]. Raises IndexError, DataError."""
        positions = self._positions(indices)
        return read_document_starts(self.sequence_length, [self] * len(positions), positions)

    def document_ends(self) -> np.ndarray:
        """int64 [documents]: `doc_end`, as it was checked when the shard was opened. Raises DataError."""
        if isinstance(self.streams, MappedStreams):
            return np.frombuffer(self.streams["doc_end"], "<i8")
        return _document_ends(self.path, self.digest)

    def document_spans(self, row: int) -> list[DocumentSpan]:
        """The documents of a row's inputs, in order. Raises IndexError, DataError."""
        _verify({self}, [self], self._positions(np.array([row])))
        table, first = self.documents(), row * self.row_stride
        found = []
        for index in range(int(np.searchsorted(table.end, first, side="right")), len(table.end)):
            begin = int(table.end[index - 1]) if index else 0
            if begin >= first + self.sequence_length:
                break
            fim = None if table.fim is None else (int(table.fim.mode[index]), *map(int, table.fim.split[index]))
            last = min(int(table.end[index]) - 1 - first, self.sequence_length - 1)
            place = (int(table.file[index]), int(table.record[index]))
            found.append(
                DocumentSpan(
                    table.id[index].tobytes(), int(table.source[index]), *place, max(begin - first, 0), last, fim
                )
            )
        return found

    def unverified(self, start: int, stop: int) -> list[int]:
        """The unverified blocks of positions start..stop-1 of `data`, as far as it goes."""
        stop = min(stop, self._num_tokens)
        first, last = start // self._block_tokens, (stop - 1) // self._block_tokens + 1
        if self._verified.find(0, first, last) < 0:
            return []
        return [block for block in range(first, last) if not self._verified[block]]

    def verify_block(self, block: int) -> None:
        """Check a block, unless it was checked before; safe from several threads. Raises DataError."""
        if self._verified[block]:
            return
        start, stop = block * self._block_tokens, min((block + 1) * self._block_tokens, self._num_tokens)
        data = self._slice("data", start, stop)
        planes = {name: self._slice(name, start, stop) for name in self.planes}
        if block_digest(data, list(planes.values())) != self._block_digest[block].tobytes():
            first = max(0, start - self.sequence_length) // self.row_stride
            last = min(self.num_rows - 1, (stop - 1) // self.row_stride)
            problem = f"block {block} (rows {first}..{last}) does not hash to its digest, so it was altered or damaged"
            raise refusal(self.path, "data", problem)
        unsigned = data.view(f"<u{data.itemsize}")  # so that a negative id is too large
        if unsigned.max() >= self.vocab_size:
            within = int(np.argmax(unsigned >= self.vocab_size))
            row = min((start + within) // self.row_stride, self.num_rows - 1)
            problem = f"row {row} holds token id {data[within]}, beyond the vocabulary of {self.vocab_size}"
            raise refusal(self.path, "data", problem)
        if TOKEN_WEIGHTS in planes and (wrong := weights_problem(planes[TOKEN_WEIGHTS], planes.get(LOSS_MASK))):
            raise refusal(self.path, TOKEN_WEIGHTS, f"block {block}: {wrong}")
        self._verified[block] = 1
        if self._verified.find(0) < 0:
            self.is_verified = True  # never set to False: another thread may have verified the last block meanwhile

    def _positions(self, indices: np.ndarray) -> list[int]:
        """Where rows begin in `data`. Raises IndexError."""
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_rows:
            raise IndexError(f"{self.path}: rows {indices.min()}..{indices.max()} of {self.num_rows}")
        return (indices * self.row_stride).tolist()

    def _slice(self, name: str, start: int, stop: int) -> np.ndarray:
        """Positions start..stop-1 of a stream, unchecked; a view of the file if it is mapped."""
        dtype = self.dtype if name == "data" else PLANES[name].stored
        return np.frombuffer(self.streams[name][start * dtype.itemsize : stop * dtype.itemsize], dtype)


def read_rows(
    ids: np.ndarray, readers: Sequence[ShardReader], positions: Sequence[int], planes: Sequence[str] = (LOSS_MASK,)
) -> dict[str, np.ndarray]:
    """Fill ids, int64 [n, S + 1]: ids[i] is the row of readers[i] that begins at positions[i] of its `data`.

    Returns those of the planes (names in PLANES) that one of the shards has, [n, S] each, a value for each label. The
    readers have one sequence length and any set and dtype. Positions are not checked; blocks are verified. Raises
    DataError.
    """
    everyone = set(readers)
    found = {
        name: np.full((len(ids), ids.shape[1] - 1), PLANES[name].absent, PLANES[name].read)
        for name in planes
        if any(reader.itemsizes[name] for reader in everyone)
    }
    count = max(1, min(_GATHERED_ROWS, _GATHERED_TOKENS // ids.shape[1]))
    for low in range(0, len(ids), count):
        part = slice(low, low + count)
        some, at = readers[part], positions[part]
        distinct = set(some)
        if fresh := {reader for reader in distinct if not reader.is_verified}:
            _verify(fresh, some, at)
        _gather(ids[part], "data", distinct, some, at)
        for name, plane in found.items():
            _gather(plane[part], name, distinct, some, at)
    return found


def _verify(fresh: set[ShardReader], readers: Sequence[ShardReader], positions: Sequence[int]) -> None:
    """Verify the unverified blocks of the readers in `fresh` that these rows lie in, on threads if there are many.

    Raises DataError for the first damaged block in the rows' order.
    """
    reached = [(reader, at) for reader, at in zip(readers, positions, strict=True) if reader in fresh]
    blocks = dict.fromkeys(
        (reader, block) for reader, at in reached for block in reader.unverified(at, at + reader.sequence_length + 1)
    )
    if len(blocks) < _THREADED_BLOCKS:
        for reader, block in blocks:
            reader.verify_block(block)
        return
    # hashing releases the GIL
    with ThreadPoolExecutor(min(len(blocks), os.cpu_count() or 1, _MAX_THREADS)) as pool:
        for _ in pool.map(lambda found: found[0].verify_block(found[1]), blocks):
            pass


def _gather(
    rows: np.ndarray, stream: str, distinct: set[ShardReader], readers: Sequence[ShardReader], positions: Sequence[int]
) -> None:
    """Fill rows[i] with its part of a stream, converted to the array's type; of a plane without the first element,
    which belongs to no label. distinct: the set of readers. Rows of shards without the stream stay as they are.
    """
    itemsizes = {reader.itemsizes[stream] for reader in distinct}
    if len(itemsizes) > 1:
        for itemsize in itemsizes:
            alike = {reader for reader in distinct if reader.itemsizes[stream] == itemsize}
            chosen = [index for index, reader in enumerate(readers) if reader in alike]
            part = rows[chosen]
            _gather(part, stream, alike, [readers[index] for index in chosen], [positions[index] for index in chosen])
            rows[chosen] = part
        return
    (itemsize,) = itemsizes
    if not itemsize:
        return
    skipped, num_bytes = int(stream != "data"), rows.shape[1] * itemsize
    starts = [(position + skipped) * itemsize for position in positions]
    stops = [start + num_bytes for start in starts]
    streams: dict[ShardReader, Any] = {reader: reader.streams[stream] for reader in distinct}
    found = b"".join(map(getitem, map(streams.__getitem__, readers), map(slice, starts, stops)))
    dtype = _TOKENS[itemsize] if stream == "data" else PLANES[stream].stored
    rows[...] = np.frombuffer(found, dtype).reshape(rows.shape)


def read_document_starts(sequence_length: int, readers: Sequence[ShardReader], positions: Sequence[int]) -> np.ndarray:
    """For each input of the rows that `read_rows` reads, where in its row its document begins: int32 [n, S].

    0 if the document began before the row. Raises DataError.
    """
    if not len(positions):
        return np.empty((0, sequence_length), dtype=np.int32)
    first = np.array(positions, dtype=np.int64)  # [n]
    bounds = np.add.outer(first, [0, sequence_length - 1])  # [n, 2]: a row's first and last input
    cuts: list[np.ndarray] = []
    for low in range(0, len(positions), _GATHERED_ROWS):
        some = readers[low : low + _GATHERED_ROWS]
        ends = {reader: reader.document_ends() for reader in set(some)}
        for reader, bound in zip(some, bounds[low : low + _GATHERED_ROWS], strict=True):
            start, stop = ends[reader].searchsorted(bound, "right")
            # where documents begin after the row's first input; no view, so that files unmap
            cuts.append(ends[reader][start:stop].copy())
    begins = np.array([1 + len(cut) for cut in cuts])  # [n]: documents of each row
    row = np.repeat(np.arange(len(cuts)), begins)  # [documents]
    within = np.zeros(len(row), dtype=np.int64)  # [documents]: where each begins in its row
    within[np.diff(row, prepend=-1) == 0] = np.concatenate(cuts) - np.repeat(first, begins - 1)
    lengths = np.diff(row * sequence_length + within, append=len(cuts) * sequence_length)
    return np.repeat(within.astype(np.int32), lengths).reshape(len(cuts), sequence_length)


def _documents(path: Path, digest: str) -> Documents:
    shard = open_shard(path)
    shard.file.close()
    if shard.header["digest"] != digest:
        raise refusal(path, "digest", "changed since the shard was opened")
    return shard.documents


@lru_cache(maxsize=64)  # 8 bytes a document: some 300 KB for a shard of 64 MiB of ordinary text
def _document_ends(path: Path, digest: str) -> np.ndarray:
    """`doc_end` of a shard that is not mapped, checked."""
    ends = _documents(path, digest).end
    ends.flags.writeable = False
    return ends
