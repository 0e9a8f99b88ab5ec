"""Stage 1, one task per part: documents are read, hashed, encoded and sorted into the order of the shuffle.

A part is written as pieces of bounded size and then a file of its own, which marks it done. Duplicates across pieces
are dropped by later stages. A document that cannot be read is recorded; whether the run continues is decided once all
parts are known.
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
from weftrain.data_prep.conversations.encode import ConversationEncoder
from weftrain.data_prep.conversations.pairs import PreferenceEncoder
from weftrain.data_prep.conversations.preferences import NoPreference, Preference
from weftrain.data_prep.conversations.template import TemplateError
from weftrain.data_prep.heldout import is_held_out
from weftrain.data_prep.marks import LOSS, MARKS, WEIGHTS, add_plane
from weftrain.data_prep.readers.documents import Document, Failure, FileRead, text_sha256
from weftrain.data_prep.readers.shares import read_part
from weftrain.data_prep.stages.part_notes import FailureList, Shares
from weftrain.data_prep.stages.pieces import DOCUMENT, Gathered, sorted_places, write_piece
from weftrain.data_prep.stages.plan import PrepPlan
from weftrain.data_prep.stages.settings import order_key
from weftrain.data_prep.tokens.tokenization import Counts, TextEncoder, encoder_for

_ENCODE_BYTES, _ENCODE_DOCUMENTS = 4 << 20, 1 << 15  # texts encoded at once


@dataclass
class _Rows:
    """A piece as one list per column, in reading order. sources: numbers of the piece's sources, by first use."""

    tokens: list[np.ndarray] = field(default_factory=list)
    planes: dict[str, list[np.ndarray]] = field(default_factory=dict)  # marks.py; of each plane one per document
    content: list[bytes] = field(default_factory=list)
    heldout: list[bool] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    record: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    held_bytes: int = 0

    def add(self, ids: np.ndarray, marks: np.ndarray | None = None, weights: np.ndarray | None = None) -> None:
        """A document's ids and planes."""
        self.tokens.append(ids)
        add_plane(self.planes, MARKS, marks, self.tokens)
        add_plane(self.planes, WEIGHTS, weights, self.tokens)


class _Text(NamedTuple):
    """A document waiting to be encoded. content: SHA-256 of its text."""

    document: Document
    record: int
    content: bytes
    num_bytes: int


def tokenize_part(plan: PrepPlan, index: int) -> None:
    """Read and encode part `index` into its pieces. Raises DataError for inputs that changed, OSError."""
    shares = Shares()
    with FailureList(plan.failures_file("parts", index)) as failures:
        writer = PartWriter(plan, index, failures)
        for item in read_part(plan.inputs.files, plan.parts[index], plan.inputs.options):
            if isinstance(item, FileRead):
                shares.add(item)
                continue
            record = item.record + shares.before(item.file)
            if isinstance(item, Failure):
                failures.add(Failure(item.file, record, item.reason))
            else:
                writer.add(item, record)
            del item  # memory may hold a text only once
            writer.write_full()
        writer.finish()
    note = {
        "pieces": writer.pieces,
        "documents": writer.documents,
        "shares": shares.listed,
        "failed": failures.count,
        "encoded": asdict(writer.counts),
    }
    fsops.write_bytes(plan.part_file(index), canonical_json(note) + b"\n")


class PartWriter:
    """Encodes the documents of a part in batches and writes a piece whenever it has its size. documents, pieces: that
    are written.
    """

    def __init__(self, plan: PrepPlan, part: int, failures: FailureList) -> None:
        self._plan, self._part, self._failures = plan, part, failures
        self._encoder = encoder_for(plan.tokenizer_file.read_bytes(), plan.settings.markers, plan.engine)
        self._conversations = plan.conversation_encoder(self._encoder)
        self._preferences = plan.preference_encoder(self._encoder)
        self._rows = _Rows()
        self._waiting: list[_Text] = []
        self._waiting_bytes = 0
        self.counts = Counts()
        self.documents = self.pieces = 0

    def add(self, document: Document, record: int) -> None:
        if isinstance(document.preference, NoPreference):
            self.counts.no_preference += 1
        elif document.tokens is not None:
            self._encode()  # columns stay in reading order
            _take_tokens(self._rows, document, record, self._encoder, self._plan, self._failures)
        else:
            self._waiting.append(_Text(document, record, *text_sha256(document.text or "")))
            self._waiting_bytes += self._waiting[-1].num_bytes

    def write_full(self) -> None:
        """Write a piece if it is full, and encode the waiting documents if there are enough."""
        limits, rows = self._plan.limits, self._rows
        full = (
            rows.held_bytes + self._waiting_bytes >= limits.piece_bytes
            or len(rows.content) + len(self._waiting) >= limits.piece_documents
        )
        if full:
            self.finish()
        elif self._waiting_bytes >= _ENCODE_BYTES or len(self._waiting) >= _ENCODE_DOCUMENTS:
            self._encode()

    def finish(self) -> None:
        """Encode what waits, and write a piece of what has not been written yet."""
        self._encode()
        if self._rows.content:
            _write(self._plan, self._part, self.pieces, self._rows, self._encoder, self.documents)
            self.documents, self.pieces = self.documents + len(self._rows.content), self.pieces + 1
            self._rows = _Rows()

    def _encode(self) -> None:
        if self._conversations is not None:
            for text in self._waiting:
                self._encode_conversation(self._conversations, text)
        elif self._preferences is not None:
            for text in self._waiting:
                self._encode_preference(self._preferences, text)
        else:
            self._encode_texts()
        self._waiting.clear()
        self._waiting_bytes = 0

    def _encode_conversation(self, encoder: ConversationEncoder, text: _Text) -> None:
        """Take the parts of a conversation, or note why it has nothing to learn."""
        document, record, content, num_bytes = text
        assert document.conversation is not None
        try:
            parts = encoder.encode(document.conversation)
        except TemplateError as error:
            self._failures.add(Failure(document.file, record, str(error)))
            return
        self.counts.reference += 1
        self.counts.divided += len(parts) > 1
        for number, part in enumerate(parts):
            self.counts.cut += part.cut
            name = content if number == 0 else hashlib.sha256(content + b" part %d" % number).digest()
            _take(self._rows, document, record, name, 0 if number else num_bytes, self._plan, self._encoder)
            self._rows.add(part.ids.astype(self._encoder.dtype), np.where(part.loss, LOSS, 0), part.weights)
            self.counts.weighted += part.weights is not None

    def _encode_preference(self, encoder: PreferenceEncoder, text: _Text) -> None:
        """Take the row of a pair, or note why it has nothing to learn."""
        document, record, content, num_bytes = text
        assert isinstance(document.preference, Preference)
        try:
            row = encoder.encode(document.preference)
        except TemplateError as error:
            self._failures.add(Failure(document.file, record, str(error)))
            return
        self.counts.reference += 1
        self.counts.cut_prompts += row.cut_prompt
        self.counts.cut_answers += row.cut_answers
        _take(self._rows, document, record, content, num_bytes, self._plan, self._encoder)
        self._rows.add(row.ids.astype(self._encoder.dtype), row.marks)

    def _encode_texts(self) -> None:
        encoded = self._encoder.encode_each(
            [text.document.text or "" for text in self._waiting],
            _Places(self._plan, self._waiting),
            [text.content for text in self._waiting],
            self.counts,
        )
        for (document, record, content, num_bytes), ids in zip(self._waiting, encoded, strict=True):
            if isinstance(ids, str):
                self._failures.add(Failure(document.file, record, ids))
            else:
                _take(self._rows, document, record, content, num_bytes, self._plan, self._encoder)
                weights = None if document.weight == 1 else np.full(len(ids), document.weight, np.float32)
                self._rows.add(ids, weights=weights)
                self.counts.weighted += document.weight not in (0, 1)


def _take(
    rows: _Rows, document: Document, record: int, content: bytes, num_bytes: int, plan: PrepPlan, encoder: TextEncoder
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
    rows: _Rows, document: Document, record: int, encoder: TextEncoder, plan: PrepPlan, failures: FailureList
) -> None:
    """Take a document that was tokenised elsewhere; a whole document loses its start and end token."""
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
    rows.add(tokens.astype(encoder.dtype), marks)


def _write(plan: PrepPlan, part: int, piece: int, columns: _Rows, encoder: TextEncoder, first_place: int) -> None:
    """Write a piece. first_place: number of documents in the part's earlier pieces."""
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
    planes = {name: np.concatenate([plane[place] for place in places]) for name, plane in columns.planes.items()}
    write_piece(
        plan.piece_file(part, piece), Gathered(rows, tokens, planes), {"sources": list(columns.sources), "read": count}
    )


class _Places(Sequence[str]):
    """Where documents lie, formatted only when a message needs it."""

    def __init__(self, plan: PrepPlan, texts: Sequence[_Text]) -> None:
        self._plan, self._texts = plan, texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        text = self._texts[index]
        return f"{self._plan.inputs.files[text.document.file].name}:{text.record + 1}"
