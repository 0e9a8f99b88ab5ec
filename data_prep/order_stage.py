"""Between stages 1 and 2 a survey of all parts; then stage 2, a task a bucket: one slice of the shuffle, gathered from every part.

A bucket is a range of order keys. Equal texts have equal keys, so duplicates meet in one bucket, and the buckets one after the other are
the shuffled stream. What a reader would get wrong: a bucket file holds the documents as they will be trained on, with FIM, the end token
and, for best-fit rows, padding; once for every epoch, and once for the held-out side.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core import fsops
from weftrain.core.canonical import canonical_json, parse_json
from weftrain.core.dataset import FAILURES, InputEntry, merkle_root, write_inputs
from weftrain.core.errors import DataError
from weftrain.core.line_table import write_lines
from weftrain.core.shards import ID_BYTES
from weftrain.data_prep import fim, marks
from weftrain.data_prep.packing import best_fit_rows, split
from weftrain.data_prep.plan import Plan
from weftrain.data_prep.table_file import Table, write_table
from weftrain.data_prep.tokenization import TextEncoder, encoder_for

_SHOWN_FAILURES = 8
HELDOUT = "heldout"
COLUMNS = ("length", "source", "file", "record", "fim_mode", "fim_a", "fim_b")  # of a document in a stream, int64


def stream_names(plan: Plan) -> list[str]:
    """The token streams of a dataset: one an epoch, and the held-out documents."""
    streams = [f"train.{epoch}" for epoch in range(plan.settings.epochs)]
    return streams + ([HELDOUT] if plan.settings.heldout_fraction else [])


def survey(plan: Plan, max_failures: int) -> dict[str, Any]:
    """What all parts hold together, written as survey.json. Raises DataError where more documents failed than the budget allows.

    `bases`: for each part, where its share of a file does not begin at line 0, the lines before it. `inputs`: of inputs.jsonl, which is
    written here, as the sources' names and each part's numbers for them are.
    """
    notes, identities = [], []
    for index in range(len(plan.parts)):
        notes.append(Table(plan.part_file(index)).note)
        identities.append(_identities(notes[-1].pop("sources")))  # there may be millions of names
    bases, failures = place_failures(plan, notes)
    check_failures(plan, failures, max_failures)
    found = {
        "num_sources": _number_sources(plan, identities),
        "bases": bases,
        "inputs": _write_inputs(plan, notes),
        "failed": len(failures),
        "reference_documents": sum(note["encoded"]["reference"] for note in notes),
        "checked_documents": sum(note["encoded"]["checked"] for note in notes),
        "unknown_tokens": sum(note["encoded"]["unknown"] for note in notes),
    }
    fsops.write_bytes(plan.survey_file, canonical_json(found) + b"\n")
    return found


def _identities(names: Sequence[str]) -> np.ndarray:
    """uint64 [n, 2]: what tells the names apart, 16 bytes each, from their SHA-256."""
    return np.frombuffer(b"".join(hashlib.sha256(name.encode()).digest()[:16] for name in names), "<u8").reshape(-1, 2)


def _number_sources(plan: Plan, identities: Sequence[np.ndarray]) -> int:
    """Number all sources in order of appearance, and write the names and each part's numbers. identities: of each part's names.

    Some 50 bytes a name are in memory, which are fewer than the names themselves have.
    """
    joined = np.concatenate(identities)
    if not len(joined):
        raise DataError(f"{plan.inputs.description}: holds no document; name other files")
    order = np.lexsort((joined[:, 1], joined[:, 0]))  # stable: of equal names the first one leads
    fresh = np.append(True, (joined[order[1:]] != joined[order[:-1]]).any(axis=1))
    leaders = order[fresh]
    ranks = np.empty(len(leaders), np.int32)
    ranks[np.argsort(leaders)] = np.arange(len(leaders), dtype=np.int32)
    numbers = np.empty(len(joined), np.int32)
    numbers[order] = ranks[np.cumsum(fresh) - 1]
    of_parts = split(numbers, np.cumsum([len(part) for part in identities]))
    write_table(plan.numbers_file, {f"{part:05d}": found for part, found in enumerate(of_parts)}, {})

    def names() -> Iterator[str]:
        count = 0
        for part, found in enumerate(of_parts):
            for name, number in zip(Table(plan.part_file(part)).note["sources"], found.tolist(), strict=True):
                if number == count:
                    yield name
                    count += 1

    return write_lines(plan.names_file, names()).count


def _write_inputs(plan: Plan, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write inputs.jsonl: the files that were read, then those that were left out. Returns what the manifest says of it."""
    hashes: dict[int, list[str]] = {}
    for note in notes:
        for file, _, _, sha256 in note["shares"]:
            hashes.setdefault(file, []).append(sha256)

    def entries() -> Iterator[InputEntry]:
        for index, file in enumerate(plan.inputs.files):
            yield InputEntry(name=file.name, num_bytes=file.num_bytes, sha256=tuple(hashes.get(index, ())))
        for one in plan.inputs.skipped:
            yield InputEntry(name=one.name, num_bytes=one.num_bytes, skipped=one.reason)

    return {
        "sha256": write_inputs(plan.dataset, entries()).sha256,
        "corpus_sha256": merkle_root(sha256 for index in range(len(plan.inputs.files)) for sha256 in hashes.get(index, ())),
        "files": len(plan.inputs.files),
        "num_bytes": sum(file.num_bytes for file in plan.inputs.files),
        "skipped": dict(sorted(Counter(entry.reason for entry in plan.inputs.skipped).items())),
    }


def place_failures(plan: Plan, notes: Sequence[dict[str, Any]]) -> tuple[list[dict[str, int]], list[dict[str, str]]]:
    """For each part the lines of each of its files before its share of it, where there are any; and all failures with their real lines."""
    lines: Counter[int] = Counter()  # of each file so far
    bases: list[dict[str, int]] = []
    for note in notes:
        bases.append({str(file): lines[file] for file, *_ in note["shares"] if lines[file]})
        for file, _, records, _ in note["shares"]:
            lines[file] += records
    failures = [
        {"place": f"{plan.inputs.files[file].name}:{record + bases[part].get(str(file), 0) + 1}", "reason": reason}
        for part, note in enumerate(notes)
        for file, record, reason in note["failures"]
    ]
    return bases, failures


def check_failures(plan: Plan, failures: Sequence[dict[str, str]], max_failures: int) -> None:
    """All of them into a file; too many are an error that names the first. Raises DataError."""
    path = plan.dataset / FAILURES
    if failures:
        fsops.write_bytes(path, b"".join(canonical_json(failure) + b"\n" for failure in failures))
    if len(failures) > max_failures:
        shown = "; ".join(f"{failure['place']}: {failure['reason']}" for failure in failures[:_SHOWN_FAILURES])
        more = f"; {len(failures) - _SHOWN_FAILURES} more in {path}" if len(failures) > _SHOWN_FAILURES else ""
        budget = f"; {len(failures)} documents failed, --max-failures allows {max_failures}" if len(failures) > 1 or max_failures else ""
        raise DataError(f"{shown}{more}{budget}")


def load_json(path: Path) -> Any:
    """A file that a stage left; kept, since every task of a process asks for it. Raises DataError."""
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove {path.parent} and prepare again") from error


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, modified_ns: int) -> Any:
    return parse_json(path.read_bytes())


@dataclass
class _Gathered:
    """A bucket's documents: columns int64 [n], tokens and masks a document each, content [n, 32]."""

    columns: dict[str, np.ndarray]
    content: np.ndarray
    tokens: list[np.ndarray]
    masks: list[np.ndarray] | None
    read: int


@dataclass
class _Stream:
    """One stream of a bucket, a list a column."""

    tokens: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    ids: list[bytes] = field(default_factory=list)
    rows: list[tuple[int, ...]] = field(default_factory=list)  # COLUMNS

    def add(self, tokens: np.ndarray, mask: np.ndarray | None, identity: bytes, row: Sequence[int]) -> None:
        self.tokens.append(tokens)
        if mask is not None:
            self.masks.append(mask)
        self.ids.append(identity)
        self.rows.append((len(tokens), *row))


def order_bucket(plan: Plan, index: int) -> None:
    """Gather, deduplicate, transform and lay out bucket `index`. Raises DataError, OSError."""
    found = load_json(plan.survey_file)
    encoder = encoder_for(plan.tokenizer_file.read_bytes(), plan.settings.eos, plan.engine)
    gathered = _gather(plan, index, found)
    kept = _without_duplicates(plan, gathered)
    heldout = gathered.columns["heldout"].astype(bool)
    arrays: dict[str, np.ndarray] = {}
    note: dict[str, Any] = {"read": gathered.read, "duplicates": gathered.read - len(kept), "documents": {}, "tokens": {}, "padding": {}}
    for name in stream_names(plan):
        chosen = kept[heldout[kept] == (name == HELDOUT)]
        epoch = 0 if name == HELDOUT else int(name.removeprefix("train."))
        stream = _transformed(plan, gathered, chosen, epoch, encoder)
        if plan.settings.packing == "best_fit" and not plan.fixed_rows:
            stream = _best_fit(plan, stream, encoder)
        if plan.fixed_rows and stream.masks:
            stream = _split_rows(stream)
        arrays |= _arrays(name, stream, encoder)
        note["documents"][name] = len(chosen)
        note["tokens"][name] = sum(len(tokens) for tokens in stream.tokens)
        note["padding"][name] = sum(row[0] for row in stream.rows if row[2] < 0)
    train = kept[~heldout[kept]]
    arrays["sources"] = _source_counts(gathered.columns["source"][train], gathered.columns["num_bytes"][train], arrays["train.0.table"])
    write_table(plan.bucket_file(index), arrays, note)


def _source_counts(source: np.ndarray, num_bytes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Of each source that the bucket's training documents have, int64 [n, 4]: its number, documents, bytes, and tokens in `table`."""
    names, places = np.unique(source, return_inverse=True)
    real = table[table[:, 1] >= 0]
    tokens = np.bincount(np.searchsorted(names, real[:, 1]), real[:, 0], len(names))
    counts = [np.bincount(places, minlength=len(names)), np.bincount(places, num_bytes, len(names)), tokens]
    return np.column_stack([names, *counts]).astype(np.int64)


def _gather(plan: Plan, index: int, found: dict[str, Any]) -> _Gathered:
    """The bucket's documents of every part, in the order of keys and, among equals, of reading."""
    numbers = Table(plan.numbers_file)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("heldout", "source", "file", "record", "num_bytes", "part", "place")}
    keys, content, tokens = [], [], []
    masks: list[np.ndarray | None] = []
    has_mask = False
    for part in [index] if plan.settings.order == "as_read" else range(len(plan.parts)):
        table = Table(plan.part_file(part))
        key = table["key"]
        low, high = (0, len(key)) if plan.settings.order == "as_read" else _range(key, index, plan.buckets)
        ends = np.cumsum(table["length"])
        starts = ends - table["length"]
        for name in ("heldout", "file", "num_bytes", "place"):
            columns[name].append(table.slice(name, low, high))
        columns["source"].append(numbers[f"{part:05d}"].astype(np.int64)[table.slice("source", low, high)])
        columns["record"].append(table.slice("record", low, high) + _bases(found["bases"][part], columns["file"][-1]))
        columns["part"].append(np.full(high - low, part, np.int64))
        keys.append(key[low:high])
        content.append(table.slice("content", low, high))
        if high > low:
            first, last = int(starts[low]), int(ends[high - 1])
            cuts = ends[low:high] - first
            tokens += split(table.slice("tokens", first, last), cuts)
            has_mask |= "mask" in table
            masks += split(table.slice("mask", first, last), cuts) if "mask" in table else [None] * (high - low)
    joined = {name: np.concatenate(pieces) for name, pieces in columns.items()}
    words = np.ascontiguousarray(np.concatenate(keys)).view(">u8").astype(np.uint64)  # [n, 4]: compared as the bytes are
    by_key = [words[:, column] for column in range(words.shape[1])] if plan.settings.order == "shuffled" else []
    order = np.lexsort((joined["place"], joined["part"], *reversed(by_key)))
    return _Gathered(
        {name: column[order] for name, column in joined.items()},
        np.concatenate(content)[order],
        [tokens[place] for place in order],
        [_mask(masks[place], len(tokens[place])) for place in order] if has_mask else None,
        len(order),
    )


def _mask(mask: np.ndarray | None, length: int) -> np.ndarray:
    return np.ones(length, np.uint8) if mask is None else mask


def _range(keys: np.ndarray, index: int, buckets: int) -> tuple[int, int]:
    """Which of a part's sorted keys, uint8 [n, 32], lie in bucket `index` of a power of two of buckets."""
    heads = np.ascontiguousarray(keys[:, :8]).view(">u8").reshape(-1)
    width = (1 << 64) // buckets
    low = int(np.searchsorted(heads, np.array(index * width, ">u8"), "left"))
    high = len(heads) if index == buckets - 1 else int(np.searchsorted(heads, np.array((index + 1) * width, ">u8"), "left"))
    return low, high


def _bases(bases: dict[str, int], files: np.ndarray) -> np.ndarray:
    """Lines before the part's share of each document's file."""
    result = np.zeros(len(files), np.int64)
    for file, base in bases.items():
        result[files == int(file)] = base
    return result


def _without_duplicates(plan: Plan, gathered: _Gathered) -> np.ndarray:
    """The documents to keep: of equal texts the one that was read first; all of them where they stay as read."""
    if plan.settings.order == "as_read" or not gathered.read:
        return np.arange(gathered.read)
    same = (gathered.content[1:] == gathered.content[:-1]).all(axis=1)
    return np.flatnonzero(np.append(True, ~same))


def _transformed(plan: Plan, gathered: _Gathered, chosen: np.ndarray, epoch: int, encoder: TextEncoder) -> _Stream:
    """The chosen documents with FIM and end tokens."""
    stream, settings = _Stream(), plan.settings
    exact = settings.fim if settings.fim is not None and settings.fim.mode == "exact" else None
    ids = fim.fim_ids(encoder) if exact is not None else None
    end = np.array([encoder.eos_id], encoder.dtype)
    one = np.ones(1, np.uint8)
    columns = [gathered.columns[name][chosen].tolist() for name in ("source", "file", "record")]
    for place, source, file, record in zip(chosen.tolist(), *columns, strict=True):
        tokens, mask = gathered.tokens[place], None if gathered.masks is None else gathered.masks[place]
        content = gathered.content[place].tobytes()
        record_of_fim = (0, 0, 0)
        if exact is not None and ids is not None:
            record_of_fim = fim.draw(settings.seed, content, epoch, exact.rate, exact.spm_share, len(tokens))
            tokens = fim.transform(tokens, *record_of_fim, ids)
        if not plan.fixed_rows:
            tokens = np.concatenate([tokens, end])
            mask = None if mask is None else np.concatenate([mask, one])
        stream.add(tokens, mask, content[:ID_BYTES], (source, file, record, *record_of_fim))
    return stream


def _best_fit(plan: Plan, stream: _Stream, encoder: TextEncoder) -> _Stream:
    """The stream as rows that stand alone, each padded to its end."""
    packed, width = _Stream(), plan.settings.row_tokens
    lengths = np.array([len(tokens) for tokens in stream.tokens], np.int64)
    for pieces in best_fit_rows(lengths, width):
        left = width
        for piece in pieces:
            tokens = stream.tokens[piece.document][piece.start : piece.stop]
            mask = stream.masks[piece.document][piece.start : piece.stop] if stream.masks else np.ones(len(tokens), np.uint8)
            packed.add(tokens, mask, stream.ids[piece.document], stream.rows[piece.document][1:])
            left -= len(tokens)
        if left:
            padding = np.full(left, encoder.eos_id, encoder.dtype)
            packed.add(padding, np.zeros(left, np.uint8), bytes(ID_BYTES), (-1, -1, -1, 0, 0, 0))
    return packed


def _split_rows(stream: _Stream) -> _Stream:
    """Rows as they are, with the documents and the padding that their marks tell apart as entries of their own.

    A document that shares its row with others has the SHA-256 of its own ids, as int32, for its identity.
    """
    split_up = _Stream()
    for tokens, mark, identity, row in zip(stream.tokens, stream.masks, stream.ids, stream.rows, strict=True):
        found = list(marks.pieces(mark))
        shared = sum(not piece.padding for piece in found) > 1
        for start, stop, padding in found:
            mask = mark[start:stop] & marks.LOSS
            if padding:
                split_up.add(tokens[start:stop], mask, bytes(ID_BYTES), (-1, -1, -1, 0, 0, 0))
            else:
                own = hashlib.sha256(tokens[start:stop].astype("<i4").tobytes()).digest()[:ID_BYTES] if shared else identity
                split_up.add(tokens[start:stop], mask, own, row[1:])
    if all(mask.all() for mask in split_up.masks):
        split_up.masks.clear()
    return split_up


def _arrays(name: str, stream: _Stream, encoder: TextEncoder) -> dict[str, np.ndarray]:
    table = np.array(stream.rows, np.int64).reshape(-1, len(COLUMNS))
    arrays = {
        f"{name}.tokens": np.concatenate(stream.tokens) if stream.tokens else np.empty(0, encoder.dtype),
        f"{name}.id": np.frombuffer(b"".join(stream.ids), np.uint8).reshape(-1, ID_BYTES),
        f"{name}.table": table,
    }
    if stream.masks:
        arrays[f"{name}.mask"] = np.concatenate(stream.masks)
    return arrays
