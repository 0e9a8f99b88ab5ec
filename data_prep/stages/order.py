"""Stage 2, one task per bucket: one slice of the shuffle, gathered from every piece; before it, the merging of pieces.

A bucket is a range of order keys. Equal texts have equal keys, so duplicates meet in one bucket, and the buckets in
sequence are the shuffled stream. A bucket's streams, one file per epoch and one for the held-out set, hold documents as
they are trained on: with FIM, start and end tokens and, in rows that stand alone, padding.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.shard_format import ID_BYTES
from weftrain.data_prep import marks
from weftrain.data_prep.fim import exact as fim
from weftrain.data_prep.fim.context import Draws, context_pieces, context_tokens, filled_rows
from weftrain.data_prep.growth import is_known
from weftrain.data_prep.marks import MARKS, PLANES, WEIGHTS, plain
from weftrain.data_prep.stages.pieces import Gathered, Piece, gather, write_piece
from weftrain.data_prep.stages.plan import PrepPlan
from weftrain.data_prep.stages.survey import load_json, pieces_of
from weftrain.data_prep.stages.table_file import write_table
from weftrain.data_prep.tokens.packing import best_fit_rows, separate_rows
from weftrain.data_prep.tokens.tokenization import TextEncoder, encoder_for

HELDOUT = "heldout"


@dataclass
class Stream:
    """Documents as they are trained on. tokens [length]; planes: those that a document has (marks.py), [length] each,
    and after `_split_rows` no mark but LOSS.

    Per document, with padding as one: end int64 [n], id uint8 [n, 16], source, file and record int64 [n], fim int32 [n,
    3] (mode and the two cuts) or None.
    """

    tokens: np.ndarray
    planes: dict[str, np.ndarray]
    end: np.ndarray
    id: np.ndarray
    source: np.ndarray
    file: np.ndarray
    record: np.ndarray
    fim: np.ndarray | None

    def arrays(self) -> dict[str, np.ndarray]:
        columns = {name: value for name in STREAM_COLUMNS if (value := getattr(self, name)) is not None}
        return {"tokens": self.tokens, **self.planes, **columns}


STREAM_COLUMNS = ("end", "id", "source", "file", "record", "fim")  # a value a document, in the order of Stream's fields


def stream_names(plan: PrepPlan) -> list[str]:
    """The token streams of a dataset: one per epoch, and the held-out documents."""
    streams = [f"train.{epoch}" for epoch in range(plan.settings.epochs)]
    return streams + ([HELDOUT] if plan.settings.heldout_fraction else [])


def merge_run(plan: PrepPlan, index: int) -> None:
    """Merge the pieces of run `index` in key order, one file per range of keys. Raises DataError, OSError."""
    found = load_json(plan.survey_file)
    pieces = pieces_of(plan, index * found["run_pieces"], (index + 1) * found["run_pieces"])
    for key_range in range(found["run_slices"]):
        write_piece(plan.run_slice_file(index, key_range), gather(pieces, key_range, found["run_slices"]), {})
    fsops.write_bytes(plan.run_file(index), canonical_json({"pieces": len(pieces)}) + b"\n")


def order_bucket(plan: PrepPlan, index: int) -> None:
    """Gather, deduplicate, transform and lay out bucket `index`. Raises DataError, OSError."""
    found = load_json(plan.survey_file)
    encoder = encoder_for(plan.tokenizer_file.read_bytes(), plan.settings.markers, plan.engine)
    as_read = plan.settings.order == "as_read"
    gathered = gather(_pieces(plan, found, index), index, found["buckets"], as_read=as_read)
    heldout = gathered.rows["heldout"].astype(bool)
    fresh = ~is_known(plan, gathered.rows["content"])
    note: dict[str, Any] = {"documents": {}, "tokens": {}, "padding": {}}
    sources = np.empty((0, 4), np.int64)
    for name in stream_names(plan):
        chosen = np.flatnonzero(fresh & (heldout == (name == HELDOUT)))
        epoch = 0 if name == HELDOUT else int(name.removeprefix("train."))
        if plan.settings.fim is not None and plan.settings.fim.mode == "context":
            stream = _in_context(plan, gathered, chosen, epoch, encoder)
        else:
            stream = transformed(plan, gathered, chosen, epoch, encoder)
            if plan.settings.packing != "concatenate" and not plan.fixed_rows:
                stream = _best_fit(plan, stream, encoder)
        if plan.fixed_rows and MARKS in stream.planes:
            stream = _split_rows(stream, pairs=plan.settings.preferences is not None)
        lengths = np.diff(stream.end, prepend=0)
        note["documents"][name] = len(chosen)
        note["tokens"][name] = len(stream.tokens)
        note["padding"][name] = int(lengths[stream.file < 0].sum())
        if name == "train.0":
            sources = _source_counts(gathered.rows[chosen], stream.source, lengths)
        write_table(plan.stream_file(name, index), stream.arrays(), {})
        del stream
    write_table(plan.bucket_file(index), {"sources": sources}, note)


def _pieces(plan: PrepPlan, found: dict[str, Any], index: int) -> list[Piece]:
    """The tables that hold documents of bucket `index`."""
    if plan.settings.order == "as_read":
        return pieces_of(plan, index, index + 1)
    if found["runs"]:
        key_range = index * found["run_slices"] // found["buckets"]
        return [Piece(plan.run_slice_file(run, key_range)) for run in range(found["runs"])]
    return pieces_of(plan, 0)


def _source_counts(rows: np.ndarray, source: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Number, documents, bytes and tokens of each source in the bucket's training documents, int64 [n, 4]. rows:
    DOCUMENT [documents]. source, lengths: of each document of their stream, -1 for padding.
    """
    names, places = np.unique(rows["source"], return_inverse=True)
    real = source >= 0
    documents, num_bytes, tokens = np.zeros((3, len(names)), np.int64)
    np.add.at(documents, places, 1)
    np.add.at(num_bytes, places, rows["num_bytes"])
    np.add.at(tokens, np.searchsorted(names, source[real]), lengths[real])
    return np.column_stack([names.astype(np.int64), documents, num_bytes, tokens])


def transformed(plan: PrepPlan, gathered: Gathered, chosen: np.ndarray, epoch: int, encoder: TextEncoder) -> Stream:
    """The chosen documents with FIM, start and end tokens."""
    settings, rows = plan.settings, gathered.rows[chosen]
    stops, lengths = rows["end"], gathered.lengths[chosen]
    spans = list(zip((stops - lengths).tolist(), stops.tolist(), strict=True))
    pieces = [gathered.tokens[start:stop] for start, stop in spans]
    planes = {name: [plane[start:stop] for start, stop in spans] for name, plane in gathered.planes.items()}
    records = None
    if settings.fim is not None and settings.fim.mode == "exact":
        ids, rate, spm_share = fim.fim_ids(encoder), settings.fim.rate, settings.fim.spm_share
        drawn = [
            fim.draw(settings.seed, content.tobytes(), epoch, rate, spm_share, length)
            for content, length in zip(rows["content"], lengths.tolist(), strict=True)
        ]
        pieces = [fim.transform(tokens, *record, ids) for tokens, record in zip(pieces, drawn, strict=True)]
        lengths = np.array([len(tokens) for tokens in pieces], np.int64)
        records = np.array(drawn, np.int32).reshape(-1, 3)
    if not plan.fixed_rows and settings.conversations is None:  # whose template has written all tokens
        before, after = encoder.around()
        pieces = _between(before, pieces, after)
        for name, of_documents in planes.items():
            planes[name] = [_around(name, plane, len(before), len(after)) for plane in of_documents]
        lengths = lengths + len(before) + len(after)
    return Stream(
        np.concatenate(pieces) if pieces else np.empty(0, encoder.dtype),
        {name: np.concatenate([plain(name, 0), *of_documents]) for name, of_documents in planes.items()},
        np.cumsum(lengths),
        *_origins(rows),
        records,
    )


def _around(name: str, plane: np.ndarray, before: int, after: int) -> np.ndarray:
    """A document's plane with its start and end tokens, which weigh as much as its text."""
    first = plane[:1] if name == WEIGHTS and len(plane) else plain(name, 1)
    return np.concatenate([first.repeat(before), plane, first.repeat(after)])


def _between(before: np.ndarray, pieces: list[np.ndarray], after: np.ndarray) -> list[np.ndarray]:
    """Each piece with what stands before and after it, unless that is empty."""
    columns = [[part] * len(pieces) for part in (before, after) if len(part)]
    columns.insert(int(len(before) > 0), pieces)
    return [part for row in zip(*columns, strict=True) for part in row]


def _best_fit(plan: PrepPlan, stream: Stream, encoder: TextEncoder) -> Stream:
    """The stream as rows that stand alone, each padded to its end."""
    width = plan.settings.row_tokens
    begins = (stream.end - np.diff(stream.end, prepend=0)).tolist()
    padding = np.full(width, encoder.markers.separator, encoder.dtype)
    tokens, documents = [], []  # documents: which document each piece is of, -1 for padding
    planes: dict[str, list[np.ndarray]] = {name: [plain(name, 0)] for name in {MARKS: None, **stream.planes}}
    whole = {name: plain(name, width) for name in planes}  # of a document without the plane
    none = {name: np.zeros(width, PLANES[name][0]) for name in planes}  # of padding
    pack = best_fit_rows if plan.settings.packing == "best_fit" else separate_rows
    for pieces in pack(np.diff(stream.end, prepend=0), width):
        left = width
        for piece in pieces:
            start, stop = begins[piece.document] + piece.start, begins[piece.document] + piece.stop
            tokens.append(stream.tokens[start:stop])
            for name, parts in planes.items():
                known = stream.planes.get(name)
                parts.append(whole[name][: stop - start] if known is None else known[start:stop])
            documents.append(piece.document)
            left -= stop - start
        if left:
            tokens.append(padding[:left])
            for name, parts in planes.items():
                parts.append(none[name][:left])
            documents.append(-1)
    lengths = np.array([len(piece) for piece in tokens], np.int64)
    joined = np.concatenate(tokens) if tokens else stream.tokens
    together = {name: np.concatenate(parts) for name, parts in planes.items()}
    return with_padding(stream, joined, together, lengths, np.array(documents, np.int64))


def _in_context(plan: PrepPlan, gathered: Gathered, chosen: np.ndarray, epoch: int, encoder: TextEncoder) -> Stream:
    """The chosen documents with start and end tokens, in rows that stand alone, with FIM in each row and padding."""
    settings, rows, width = plan.settings, gathered.rows[chosen], plan.settings.row_tokens
    assert settings.fim is not None
    ids, around = fim.fim_ids(encoder), encoder.around()
    bos, eos = (len(part) for part in around)
    lengths = gathered.lengths[chosen]
    together = settings.packing == "concatenate"
    draws = Draws(settings.seed, epoch, settings.fim.rate, settings.fim.spm_share)
    contents = [content.tobytes() for content in rows["content"]]
    pieces = context_pieces(lengths.tolist(), contents, width, draws, bos, eos, together=together)
    sizes = np.array([piece.length(bos, eos) for piece in pieces], np.int64)
    order = (
        filled_rows(sizes, width)
        if together
        else [[piece.document for piece in row] for row in best_fit_rows(sizes, width)]
    )
    padding, stops = np.full(width, encoder.markers.separator, encoder.dtype), rows["end"].tolist()
    begins = (rows["end"] - lengths).tolist()
    tokens: list[np.ndarray] = []
    # of each piece in a row: its length, document, mode and cuts; document -1 is padding
    laid: list[tuple[int, int, int, int, int]] = []
    for row in order:
        left = width
        for number in row:
            piece, size = pieces[number], int(sizes[number])
            tokens += context_tokens(
                gathered.tokens[begins[piece.document] : stops[piece.document]], piece, *around, ids
            )
            laid.append((size, piece.document, piece.mode, piece.a, piece.b))
            left -= size
        if left:
            tokens.append(padding[:left])
            laid.append((left, -1, fim.PLAIN, 0, 0))
    table = np.array(laid, np.int64).reshape(-1, 5)
    joined = np.concatenate(tokens) if tokens else padding[:0]
    none = np.zeros(0, np.int64)
    documents = Stream(padding[:0], {}, none, *_origins(rows), None)
    made = with_padding(documents, joined, loss_plane(table[:, 1], table[:, 0]), table[:, 0], table[:, 1])
    made.fim = table[:, 2:].astype(np.int32)
    return made


def _origins(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """id, source, file and record of DOCUMENT [n]."""
    source, file, record = (rows[name].astype(np.int64) for name in ("source", "file", "record"))
    return np.ascontiguousarray(rows["content"][:, :ID_BYTES]), source, file, record


def _split_rows(stream: Stream, *, pairs: bool) -> Stream:
    """Fixed rows with the documents and padding that their marks separate as entries of their own. A document that
    shares its row has the SHA-256 of its own ids, as int32, as identity; the sides of a pair have the pair's.
    """
    row_marks = stream.planes[MARKS]
    lengths: list[int] = []
    documents: list[int] = []
    own: dict[int, np.ndarray] = {}  # identities by entry
    start = 0
    for row, end in enumerate(stream.end.tolist()):
        found = list(marks.spans(row_marks[start:end]))
        shared = not pairs and sum(not span.padding for span in found) > 1
        for span in found:
            if shared and not span.padding:
                ids = stream.tokens[start + span.start : start + span.stop].astype("<i4")
                own[len(documents)] = np.frombuffer(hashlib.sha256(ids.tobytes()).digest()[:ID_BYTES], np.uint8)
            documents.append(-1 if span.padding else row)
            lengths.append(span.stop - span.start)
        start = end
    planes = stream.planes | {MARKS: row_marks & marks.LOSS}
    made = with_padding(stream, stream.tokens, planes, np.array(lengths, np.int64), np.array(documents, np.int64))
    for place, identity in own.items():
        made.id[place] = identity
    return made


def loss_plane(documents: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Marks of pieces of which padding (document -1) bears no loss; none where there is no padding."""
    real = documents >= 0
    return {} if real.all() else {MARKS: np.repeat(real, lengths).astype(PLANES[MARKS][0])}


def with_padding(
    stream: Stream, tokens: np.ndarray, planes: dict[str, np.ndarray], lengths: np.ndarray, documents: np.ndarray
) -> Stream:
    """A stream of these tokens. lengths, documents: of each of its pieces, int64 [n]; document -1 is padding."""
    return Stream(
        tokens,
        planes,
        np.cumsum(lengths),
        np.concatenate([stream.id, np.zeros((1, ID_BYTES), np.uint8)])[documents],  # -1 takes the row that is appended
        np.append(stream.source, -1)[documents],
        np.append(stream.file, -1)[documents],
        np.append(stream.record, -1)[documents],
        None if stream.fim is None else np.concatenate([stream.fim, np.zeros((1, 3), np.int32)])[documents],
    )
