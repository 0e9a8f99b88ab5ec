"""Packing: documents, each followed by eos, as one stream cut into rows of sequence_length + 1 tokens at stride sequence_length.

What a reader would get wrong: neighbouring rows share a token, the label of one and first input of the next; so a shard of R rows holds
R * sequence_length + 1 tokens and the next shard begins with the last token of this one. Only the stream's very end is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from weftrain.core.shards import Documents


@dataclass(frozen=True)
class PackedShard:
    """tokens [rows * sequence_length + 1] and the documents that they are of."""

    tokens: np.ndarray
    documents: Documents


class Packer:
    """Packs one stream into shards of rows_per_shard rows. dropped_tokens: the tail that fills no row, known when `pack` has ended."""

    def __init__(self, sequence_length: int, rows_per_shard: int, eos_id: int, sources: tuple[str, ...]) -> None:
        self.sequence_length, self.rows_per_shard, self.eos_id, self.sources = sequence_length, rows_per_shard, eos_id, sources
        self.dropped_tokens = 0
        self._pieces: list[np.ndarray] = []  # the stream's tokens from the first that is in no shard's rows as an input
        self._ids: list[bytes] = []
        self._sources: list[int] = []
        self._length = 0
        self._cuts = 0

    def pack(self, documents: Iterable[tuple[np.ndarray, bytes, int]]) -> Iterator[PackedShard]:
        """Shards of (token ids without eos, 16-byte id, index into `sources`) in order, the last one shorter."""
        for tokens, document_id, source in documents:
            self._pieces.append(np.append(tokens, np.array(self.eos_id, dtype=tokens.dtype)))
            self._ids.append(document_id)
            self._sources.append(source)
            self._length += len(tokens) + 1
            while self._length > self.rows_per_shard * self.sequence_length:
                yield self._cut(self.rows_per_shard)
        if (rows := (self._length - 1) // self.sequence_length) > 0:
            yield self._cut(rows)
        shared = 1 if self._cuts else 0  # the first token left is the last of the shard before
        self.dropped_tokens = self._length - shared

    def _cut(self, rows: int) -> PackedShard:
        stream = np.concatenate(self._pieces)
        ends = np.cumsum([len(piece) for piece in self._pieces])
        keep_from = rows * self.sequence_length
        length = keep_from + 1
        inside = int(np.searchsorted(ends, length, side="left")) + 1  # documents with a token here; the last may go on
        documents = Documents(
            np.minimum(ends[:inside], length),
            np.frombuffer(b"".join(self._ids[:inside]), dtype=np.uint8).reshape(inside, -1),
            np.array(self._sources[:inside], dtype=np.int32),
            self.sources,
        )
        first = int(np.searchsorted(ends, keep_from, side="right"))  # the document of the shared token
        starts = np.maximum(np.append(0, ends[:-1]), keep_from)
        self._pieces = [stream[start:end] for start, end in zip(starts[first:], ends[first:], strict=True)]
        self._ids, self._sources = self._ids[first:], self._sources[first:]
        self._length -= keep_from
        self._cuts += 1
        return PackedShard(stream[:length], documents)
