"""The stage that precedes the others when a tokenizer is trained: a bounded sample of the training documents.

Each part, and then all of them together, keep the documents with the lowest keys.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np

from weftrain.data_prep.heldout import is_held_out
from weftrain.data_prep.readers.documents import Document, Failure, FileRead, text_sha256
from weftrain.data_prep.readers.shares import read_part
from weftrain.data_prep.stages.part_notes import FailureList, Shares
from weftrain.data_prep.stages.plan import PrepPlan
from weftrain.data_prep.stages.settings import order_key
from weftrain.data_prep.stages.table_file import Table, write_table

TRAINING_BYTES = 32 << 20  # text that a tokenizer is trained on: the training documents of the lowest keys
_TRAINING_DOCUMENTS = 1 << 18
# a longer text is handed to the tokenizer's trainer in pieces, since its cost grows with their length
_PIECE_CHARACTERS = 1 << 20


class _Lowest:
    """Keeps the entries with the lowest keys, each key once, up to TRAINING_BYTES or _TRAINING_DOCUMENTS."""

    def __init__(self) -> None:
        # key with its order turned round, place, bytes, what: the highest key on top
        self._heap: list[tuple[bytes, int, int, Any]] = []
        self._keys: set[bytes] = set()
        self._bytes = 0

    def add(self, key: bytes, place: int, num_bytes: int, what: Any) -> None:
        """place: rises, so that of equal keys the first is kept."""
        if key in self._keys:
            return
        self._keys.add(key)
        heapq.heappush(self._heap, (_turned(key), place, num_bytes, what))
        self._bytes += num_bytes
        while self._bytes - self._heap[0][2] >= TRAINING_BYTES or len(self._heap) > _TRAINING_DOCUMENTS:
            turned, _, dropped, _ = heapq.heappop(self._heap)
            self._keys.remove(_turned(turned))
            self._bytes -= dropped

    def by_place(self) -> list[tuple[bytes, int, Any]]:
        """(key, bytes, what) in the order of places."""
        return [
            (_turned(turned), num_bytes, what)
            for turned, _, num_bytes, what in sorted(self._heap, key=lambda entry: entry[1])
        ]


def _turned(key: bytes) -> bytes:
    """The key in reverse order, because Python's heap has the smallest on top."""
    return bytes(255 - byte for byte in key)


def sample_part(plan: PrepPlan, index: int) -> None:
    """Sample part `index`. Raises DataError for inputs that changed, OSError."""
    kept, shares = _Lowest(), Shares()
    with FailureList(plan.failures_file("samples", index)) as failures:
        for place, (document, content) in enumerate(_texts(plan, index, shares, failures)):
            if not is_held_out(document, content, plan.settings.heldout_rule, plan.settings.heldout_fraction):
                beginning = (document.text or "")[:TRAINING_BYTES].encode()[:TRAINING_BYTES]
                kept.add(order_key(plan.settings, content), place, len(beginning), beginning)
            del document
    entries = kept.by_place()
    arrays: dict[str, np.ndarray] = {
        "text": np.frombuffer(b"".join(data for _, _, data in entries), np.uint8),
        "length": np.array([num_bytes for _, num_bytes, _ in entries], np.int64),
        "key": np.frombuffer(b"".join(key for key, _, _ in entries), np.uint8).reshape(-1, 32),
    }
    write_table(plan.sample_file(index), arrays, {"shares": shares.listed, "failed": failures.count})


def _texts(plan: PrepPlan, index: int, shares: Shares, failures: FailureList) -> Iterator[tuple[Document, bytes]]:
    """Each text document with its content hash; failures and shares are recorded."""
    for item in read_part(plan.inputs.files, plan.parts[index], plan.inputs.options):
        if isinstance(item, Failure):
            failures.add(Failure(item.file, item.record + shares.before(item.file), item.reason))
        elif isinstance(item, FileRead):
            shares.add(item)
        else:
            yield item, text_sha256(item.text or "")[0]


def training_texts(plan: PrepPlan) -> Iterator[str]:
    """The texts to train a tokenizer on, each once, in reading order, long ones in pieces."""
    lowest = _Lowest()
    place = 0
    for part in range(len(plan.parts)):
        sample = Table(plan.sample_file(part))
        lengths, ends = sample["length"].tolist(), np.cumsum(sample["length"]).tolist()
        for key, length, end in zip(sample["key"], lengths, ends, strict=True):
            lowest.add(key.tobytes(), place, length, (part, end - length, end))
            place += 1
    table, opened = None, -1
    for _, _, (part, begin, end) in lowest.by_place():
        if table is None or part != opened:
            table, opened = Table(plan.sample_file(part)), part
        # the end of a long one may lie in a character
        yield from _cut(table.slice("text", begin, end).tobytes().decode(errors="ignore"))


def _cut(text: str) -> Iterator[str]:
    """A text in pieces that end at a line break if possible."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
