"""Stage 1, a task a part: documents read, hashed and encoded, and left in the order of the shuffle.

What a reader would get wrong: nothing is dropped here. A duplicate may be of another part, so the next stage decides; a document that
cannot be read is noted with its place, and whether the run goes on is decided when all parts are known.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from weftrain.data_prep.documents import Document, Failure, FileRead
from weftrain.data_prep.heldout import is_held_out
from weftrain.data_prep.plan import Plan, order_key
from weftrain.data_prep.shares import read_part
from weftrain.data_prep.table_file import Table, write_table
from weftrain.data_prep.tokenization import Counts, TextEncoder, encoder_for

_ENCODE_BYTES = 4 << 20  # text encoded at once
TRAINING_BYTES = 32 << 20  # text that a tokenizer is trained on: the training documents of the lowest keys


@dataclass
class _Rows:
    """What a part holds, a list a column, in reading order."""

    tokens: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)  # none, or one a document
    content: list[bytes] = field(default_factory=list)
    heldout: list[bool] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    record: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    failures: list[list[Any]] = field(default_factory=list)
    shares: list[list[Any]] = field(default_factory=list)


def tokenize_part(plan: Plan, index: int) -> None:
    """Read and encode part `index` into its file. Raises DataError for inputs that changed or ids outside the vocabulary, OSError."""
    encoder = encoder_for(plan.tokenizer_file.read_bytes(), plan.settings.eos, plan.engine)
    rows, counts = _Rows(), Counts()
    waiting: list[tuple[Document, bytes, int]] = []  # with the hash and the bytes of the text
    waiting_bytes = 0

    def flush() -> None:
        texts = [document.text or "" for document, _, _ in waiting]
        names = [_place(plan, document) for document, _, _ in waiting]
        encoded = encoder.encode_each(texts, names, [content for _, content, _ in waiting], counts)
        for (document, content, num_bytes), ids in zip(waiting, encoded, strict=True):
            if isinstance(ids, str):
                rows.failures.append([document.file, document.record, ids])
            else:
                _take(rows, document, content, num_bytes, plan, encoder)
                rows.tokens.append(ids)
        waiting.clear()

    for item in read_part(plan.inputs.files, plan.parts[index], plan.inputs.options):
        if isinstance(item, Failure):
            rows.failures.append([item.file, item.record, item.reason])
        elif isinstance(item, FileRead):
            rows.shares.append([item.share.file, item.share.begin, item.records, item.sha256])
        elif item.tokens is not None:
            flush()  # columns stay in reading order
            _take_tokens(rows, item, encoder, plan)
        else:
            data = (item.text or "").encode()
            waiting.append((item, hashlib.sha256(data).digest(), len(data)))
            waiting_bytes += len(data)
            if waiting_bytes >= _ENCODE_BYTES:
                flush()
                waiting_bytes = 0
    flush()
    _write(plan, index, rows, encoder, asdict(counts))


def _take(rows: _Rows, document: Document, content: bytes, num_bytes: int, plan: Plan, encoder: TextEncoder) -> None:
    rows.content.append(content)
    settings = plan.settings
    rows.heldout.append(is_held_out(document, content, settings.heldout_rule, settings.heldout_fraction, encoder))
    rows.source.append(rows.sources.setdefault(document.source, len(rows.sources)))
    rows.file.append(document.file)
    rows.record.append(document.record)
    rows.num_bytes.append(num_bytes)


def _take_tokens(rows: _Rows, document: Document, encoder: TextEncoder, plan: Plan) -> None:
    """A document that was tokenised elsewhere: ids within the vocabulary, the end token of a whole document taken off."""
    tokens = document.tokens
    assert tokens is not None
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < encoder.vocab_size:
        reason = f"token ids {tokens.min()}..{tokens.max()} do not fit the tokenizer's {encoder.vocab_size}: name the tokenizer they are of"
        rows.failures.append([document.file, document.record, reason])
        return
    mask = document.marks
    if not plan.fixed_rows and tokens.size and tokens[-1] == encoder.eos_id:
        tokens, mask = tokens[:-1], None if mask is None else mask[:-1]
    _take(rows, document, hashlib.sha256(tokens.astype("<i4").tobytes()).digest(), tokens.size * encoder.dtype.itemsize, plan, encoder)
    rows.tokens.append(tokens.astype(encoder.dtype))
    if mask is not None or rows.masks:
        rows.masks += [np.ones(len(ids), np.uint8) for ids in rows.tokens[len(rows.masks) : -1]]
        rows.masks.append(np.ones(len(tokens), np.uint8) if mask is None else mask.astype(np.uint8))


def _write(plan: Plan, index: int, rows: _Rows, encoder: TextEncoder, counts: dict[str, int]) -> None:
    keys = [order_key(plan.settings, content) for content in rows.content]
    places = range(len(keys))
    order = list(places) if plan.settings.order == "as_read" else sorted(places, key=lambda place: (keys[place], place))
    arrays: dict[str, np.ndarray] = {
        "tokens": _joined([rows.tokens[place] for place in order], encoder.dtype),
        "length": np.array([len(rows.tokens[place]) for place in order], np.int64),
        "key": np.frombuffer(b"".join(keys[place] for place in order), np.uint8).reshape(-1, 32),
        "content": np.frombuffer(b"".join(rows.content[place] for place in order), np.uint8).reshape(-1, 32),
        "place": np.array(order, np.int64),
    }
    for name in ("heldout", "source", "file", "record", "num_bytes"):
        arrays[name] = np.array(getattr(rows, name), np.int64)[order]
    if rows.masks:
        arrays["mask"] = _joined([rows.masks[place] for place in order], np.dtype(np.uint8))
    note = {"sources": list(rows.sources), "failures": rows.failures, "shares": rows.shares, "encoded": counts}
    write_table(plan.part_file(index), arrays, note)


def _joined(pieces: list[np.ndarray], dtype: np.dtype[Any]) -> np.ndarray:
    return np.concatenate(pieces).astype(dtype, copy=False) if pieces else np.empty(0, dtype)


def _place(plan: Plan, document: Document) -> str:
    return f"{plan.inputs.files[document.file].name}:{document.record + 1}"


def sample_part(plan: Plan, index: int) -> None:
    """For a tokenizer yet to be trained: of part `index` the training documents of the lowest keys, at most TRAINING_BYTES of them."""
    kept: list[tuple[bytes, int, bytes]] = []  # a heap of (key with its order turned round, -place, text): the highest key on top
    kept_bytes = 0
    note: dict[str, Any] = {"failures": [], "shares": []}
    settings = plan.settings
    for place, (document, content, data) in enumerate(_texts(plan, index, note)):
        if is_held_out(document, content, settings.heldout_rule, settings.heldout_fraction):
            continue
        heapq.heappush(kept, (_turned(order_key(settings, content)), -place, data))
        kept_bytes += len(data)
        while kept_bytes - len(kept[0][2]) >= TRAINING_BYTES:
            kept_bytes -= len(heapq.heappop(kept)[2])
    kept.sort(key=lambda entry: -entry[1])
    arrays: dict[str, np.ndarray] = {
        "text": np.frombuffer(b"".join(data for _, _, data in kept), np.uint8),
        "length": np.array([len(data) for _, _, data in kept], np.int64),
        "key": np.frombuffer(b"".join(_turned(key) for key, _, _ in kept), np.uint8).reshape(-1, 32),
    }
    write_table(plan.sample_file(index), arrays, note)


def _texts(plan: Plan, index: int, note: dict[str, Any]) -> Iterator[tuple[Document, bytes, bytes]]:
    """(the document, its content hash, its UTF-8) of each text; failures and shares go into the note."""
    for item in read_part(plan.inputs.files, plan.parts[index], plan.inputs.options):
        if isinstance(item, Failure):
            note["failures"].append([item.file, item.record, item.reason])
        elif isinstance(item, FileRead):
            note["shares"].append([item.share.file, item.share.begin, item.records, item.sha256])
        else:
            data = (item.text or "").encode()
            yield item, hashlib.sha256(data).digest(), data


def _turned(key: bytes) -> bytes:
    """A key whose order is the other way round: Python's heap has the smallest on top."""
    return bytes(255 - byte for byte in key)


def training_texts(plan: Plan) -> Iterator[str]:
    """The texts to train a tokenizer on: of all samples those of the lowest keys up to TRAINING_BYTES, each once, in reading order."""
    entries: list[tuple[bytes, int, int, int, int]] = []  # key, part, place, begin, end
    for part in range(len(plan.parts)):
        sample = Table(plan.sample_file(part))
        keys, ends = sample["key"], np.cumsum(sample["length"])
        entries += [
            (keys[place].tobytes(), part, place, int(end - length), int(end))
            for place, (end, length) in enumerate(zip(ends, sample["length"], strict=True))
        ]
    chosen, chosen_bytes, last = [], 0, b""
    for entry in sorted(entries):
        if chosen_bytes >= TRAINING_BYTES:
            break
        if entry[0] != last:  # equal keys are equal texts
            chosen.append(entry)
            chosen_bytes += entry[4] - entry[3]
        last = entry[0]
    table: Table | None = None
    opened = -1
    for _, part, _, begin, end in sorted(chosen, key=lambda entry: entry[1:]):
        if part != opened:
            table, opened = Table(plan.sample_file(part)), part
        assert table is not None
        yield table.slice("text", begin, end).tobytes().decode()
