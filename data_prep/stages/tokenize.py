"""Stage 1, a task a part: documents read, hashed and encoded, and left in the order of the shuffle.

A part writes as many pieces as its documents need, each of a bounded size, and lastly its own file, which says that it
is done. Only equal documents of one piece are dropped here: of the others the next stages decide, which see all parts.
A document that cannot be read is noted with its place, and whether the run goes on is decided when all parts are known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json
from weftrain.data_prep.heldout import is_held_out
from weftrain.data_prep.marks import LOSS
from weftrain.data_prep.readers.documents import Document, Failure, FileRead, text_sha256
from weftrain.data_prep.readers.shares import read_part
from weftrain.data_prep.stages.part_notes import FailureList, Shares
from weftrain.data_prep.stages.pieces import DOCUMENT, Gathered, sorted_places, write_piece
from weftrain.data_prep.stages.plan import Plan, order_key
from weftrain.data_prep.tokens.tokenization import Counts, TextEncoder, encoder_for

_ENCODE_BYTES, _ENCODE_DOCUMENTS = 4 << 20, 1 << 15  # texts encoded at once


@dataclass
class _Rows:
    """What a piece holds, a list a column, in reading order. sources: of this piece, numbered as they come."""

    tokens: list[np.ndarray] = field(default_factory=list)
    marks: list[np.ndarray] = field(default_factory=list)  # none, or of each document
    content: list[bytes] = field(default_factory=list)
    heldout: list[bool] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    record: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    held_bytes: int = 0


class _Text(NamedTuple):
    """A document that waits to be encoded. record: within the part. content, num_bytes: SHA-256 and size of its
    text.
    """

    document: Document
    record: int
    content: bytes
    num_bytes: int


def tokenize_part(plan: Plan, index: int) -> None:
    """Read and encode part `index` into its pieces. Raises DataError for inputs that changed or ids outside the
    vocabulary, OSError.
    """
    encoder = encoder_for(plan.tokenizer_file.read_bytes(), plan.settings.markers, plan.engine)
    rows, counts, shares = _Rows(), Counts(), Shares()
    waiting: list[_Text] = []
    documents = pieces = 0

    def encode() -> None:
        encoded = encoder.encode_each(
            [text.document.text or "" for text in waiting],
            _Places(plan, waiting),
            [text.content for text in waiting],
            counts,
        )
        for (document, record, content, num_bytes), ids in zip(waiting, encoded, strict=True):
            if isinstance(ids, str):
                failures.add(Failure(document.file, record, ids))
            else:
                _take(rows, document, record, content, num_bytes, plan, encoder)
                rows.tokens.append(ids)
        waiting.clear()

    def flush() -> None:
        nonlocal rows, documents, pieces
        _write(plan, index, pieces, rows, encoder, documents)
        documents, pieces = documents + len(rows.content), pieces + 1
        rows = _Rows()

    with FailureList(plan.failures_file("parts", index)) as failures:
        waiting_bytes = 0
        for item in read_part(plan.inputs.files, plan.parts[index], plan.inputs.options):
            if isinstance(item, FileRead):
                shares.add(item)
                continue
            record = item.record + shares.before(item.file)
            if isinstance(item, Failure):
                failures.add(Failure(item.file, record, item.reason))
            elif item.tokens is not None:
                encode()  # columns stay in reading order
                waiting_bytes = 0
                _take_tokens(rows, item, record, encoder, plan, failures)
            else:
                waiting.append(_Text(item, record, *text_sha256(item.text or "")))
                waiting_bytes += waiting[-1].num_bytes
                del item  # a text may be as long as memory allows once
            full = (
                rows.held_bytes + waiting_bytes >= plan.limits.piece_bytes
                or len(rows.content) + len(waiting) >= plan.limits.piece_documents
            )
            if full or waiting_bytes >= _ENCODE_BYTES or len(waiting) >= _ENCODE_DOCUMENTS:
                encode()
                waiting_bytes = 0
            if full and rows.content:
                flush()
        encode()
        if rows.content:
            flush()
    note = {
        "pieces": pieces,
        "documents": documents,
        "shares": shares.listed,
        "failed": failures.count,
        "encoded": asdict(counts),
    }
    fsops.write_bytes(plan.part_file(index), canonical_json(note) + b"\n")


def _take(
    rows: _Rows, document: Document, record: int, content: bytes, num_bytes: int, plan: Plan, encoder: TextEncoder
) -> None:
    rows.content.append(content)
    settings = plan.settings
    rows.heldout.append(is_held_out(document, content, settings.heldout_rule, settings.heldout_fraction, encoder))
    if document.source not in rows.sources:
        rows.sources[document.source] = len(rows.sources)
        rows.held_bytes += len(document.source)
    rows.source.append(rows.sources[document.source])
    rows.file.append(document.file)
    rows.record.append(record)
    rows.num_bytes.append(num_bytes)
    rows.held_bytes += num_bytes


def _take_tokens(
    rows: _Rows, document: Document, record: int, encoder: TextEncoder, plan: Plan, failures: FailureList
) -> None:
    """A document that was tokenised elsewhere: ids within the vocabulary, start and end token of a whole document taken
    off.
    """
    tokens = document.tokens
    assert tokens is not None
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < encoder.vocab_size:
        reason = (
            f"token ids {tokens.min()}..{tokens.max()} do not fit the tokenizer's {encoder.vocab_size}: name the "
            "tokenizer they are of"
        )
        failures.add(Failure(document.file, record, reason))
        return
    marks = document.marks
    if marks is not None and plan.settings.fim is not None:
        name = plan.inputs.files[document.file].name
        raise DataError(
            f"{name}:{record + 1}: has a loss mask, which fill-in-the-middle does not keep: leave --fim-rate or the "
            "mask out"
        )
    if not plan.fixed_rows:
        own = encoder.markers.own(tokens)
        tokens, marks = tokens[own], None if marks is None else marks[own]
    content, num_bytes = hashlib.sha256(tokens.astype("<i4").data).digest(), tokens.size * encoder.dtype.itemsize
    _take(rows, document, record, content, num_bytes, plan, encoder)
    rows.tokens.append(tokens.astype(encoder.dtype))
    if marks is not None or rows.marks:
        rows.marks += [np.full(len(ids), LOSS, np.uint8) for ids in rows.tokens[len(rows.marks) : -1]]
        rows.marks.append(np.full(len(tokens), LOSS, np.uint8) if marks is None else marks.astype(np.uint8))


def _write(plan: Plan, part: int, piece: int, columns: _Rows, encoder: TextEncoder, first_place: int) -> None:
    """A piece of a part. first_place: how many documents the part's pieces before hold."""
    count, settings = len(columns.content), plan.settings
    rows = np.zeros(count, DOCUMENT)
    keys = [order_key(settings, content) for content in columns.content]
    rows["key"] = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 4)
    rows["content"] = np.frombuffer(b"".join(columns.content), np.uint8).reshape(-1, 32)
    for name in ("heldout", "source", "file", "record", "num_bytes"):
        rows[name] = getattr(columns, name)
    rows["part"], rows["place"] = part, np.arange(first_place, first_place + count)
    order = np.arange(count) if settings.order == "as_read" else sorted_places(rows)
    rows, places = rows[order], order.tolist()
    chosen = [columns.tokens[place] for place in places]
    rows["end"] = np.cumsum([len(ids) for ids in chosen])
    tokens = np.concatenate(chosen, dtype=encoder.dtype)
    marks = np.concatenate([columns.marks[place] for place in places]) if columns.marks else None
    write_piece(
        plan.piece_file(part, piece), Gathered(rows, tokens, marks), {"sources": list(columns.sources), "read": count}
    )


class _Places(Sequence[str]):
    """Where documents lie, said only where a message asks."""

    def __init__(self, plan: Plan, texts: Sequence[_Text]) -> None:
        self._plan, self._texts = plan, texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        text = self._texts[index]
        return f"{self._plan.inputs.files[text.document.file].name}:{text.record + 1}"
