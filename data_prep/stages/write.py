"""The layout of all rows, made between stages 2 and 3; stage 3, one task per shard; and then the manifest.

Where a shard's tokens lie follows from the token counts of the buckets, so each shard can be written, or rewritten, by
itself. A shard never crosses the end of an epoch or of a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.croissant import write_croissant
from weftrain.core.formats.dataset import CHAT_TEMPLATE, VERSION, VERSION_4, write_dataset_manifest, write_sources
from weftrain.core.formats.dataset_manifest import (
    AppliedFim,
    Chunks,
    Corpus,
    DatasetManifest,
    DocumentCounts,
    SetEntry,
    ShardEntry,
    SourceEntry,
    Tokenization,
    merkle_root,
    shard_file,
)
from weftrain.core.formats.line_table import LineTable
from weftrain.core.formats.shard_format import Documents, FimRecord, num_tokens, write_shard
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.fim import exact as fim
from weftrain.data_prep.growth import Added, parent_manifest, parents_sources, put_parents_shards, with_parents
from weftrain.data_prep.marks import LOSS, MARKS, PLANES, WEIGHTS, plain
from weftrain.data_prep.stages.order import HELDOUT, STREAM_COLUMNS, Stream, loss_plane, stream_names, with_padding
from weftrain.data_prep.stages.plan import PrepPlan
from weftrain.data_prep.stages.settings import preparation
from weftrain.data_prep.stages.survey import load_json
from weftrain.data_prep.stages.table_file import Table
from weftrain.data_prep.tokens.tokenization import DIFFERED, TextEncoder, encoder_for


def lay_out(plan: PrepPlan) -> dict[str, Any]:
    """Decide which rows each shard holds, and write layout.json. Raises DataError where a set has no row.

    `shards`: (set, number within it, stream, first row of the stream, rows). `ends`: for each stream, the tokens up to
    the end of each bucket.
    """
    found = load_json(plan.survey_file)
    notes = [Table(plan.bucket_file(index)).note for index in range(found["buckets"])]
    ends = {name: np.cumsum([note["tokens"][name] for note in notes]).tolist() for name in stream_names(plan)}
    shards: list[list[Any]] = []
    sets: dict[str, dict[str, Any]] = {}
    for set_name in ("train", HELDOUT):
        if streams := [name for name in ends if name.startswith(set_name)]:
            sets[set_name], set_shards = _lay_out_set(plan, set_name, streams, notes)
            shards += set_shards
    layout = {
        "ends": ends,
        "shards": shards,
        "sets": sets,
        "duplicates": found["read"] - sum(entry["documents"] for entry in sets.values()),
        "sources_sha256": _write_sources(plan, found),
    }
    fsops.write_bytes(plan.layout_file, canonical_json(layout) + b"\n")
    return layout


def _lay_out_set(
    plan: PrepPlan, set_name: str, streams: list[str], notes: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[list[Any]]]:
    """What the manifest counts of a set, and its shards. notes: of each bucket. Raises DataError."""
    tokens = {name: sum(note["tokens"][name] for note in notes) for name in streams}
    documents = sum(note["documents"][streams[0]] for note in notes)
    rows = {name: _rows(plan, tokens[name]) for name in streams}
    parent, settings = plan.parent, plan.settings
    held_before = 0 if parent is None else parent.train_shards if set_name == "train" else parent.heldout_shards
    if not all(rows.values()) and not (set_name == HELDOUT and held_before):
        new = "" if parent is None else " that the dataset which grows does not hold yet"
        raise DataError(
            f"{plan.inputs.description}: the {documents} {set_name} documents{new} hold {tokens[streams[0]]} tokens, "
            f"fewer than one row of {settings.sequence_length} + 1; give more text, a shorter --sequence-length, or "
            "another --heldout-fraction (0: none)"
        )
    sections = [(name, 0, rows[name]) for name in streams]
    if set_name == "train" and settings.chunks is not None:
        each = _chunk_rows(plan, rows["train.0"])
        sections = [("train.0", chunk * each, each) for chunk in range(settings.chunks)]
    shards: list[list[Any]] = []
    for name, first, count in sections:
        for start in range(first, first + count, settings.rows_per_shard):
            number = held_before + len(shards)
            shards.append([set_name, number, name, start, min(settings.rows_per_shard, first + count - start)])
    used = sum(count for _, _, count in sections)
    counts = {
        "documents": documents,
        "epochs": list(rows.values()) if len(streams) > 1 else [used],
        "dropped_tokens": sum(tokens.values()) - (_tokens_used(plan, used, len(streams)) if used else 0),
        "padding_tokens": sum(note["padding"][name] for note in notes for name in streams),
    }
    return counts, shards


def _write_sources(plan: PrepPlan, found: dict[str, Any]) -> str:
    """Write sources.jsonl: names with the counts over all buckets. Returns its SHA-256."""
    totals = np.zeros((found["num_sources"], 3), np.int64)
    for bucket in range(found["buckets"]):
        counts = Table(plan.bucket_file(bucket))["sources"]
        totals[counts[:, 0]] += counts[:, 1:]
    for number, entry in enumerate(parents_sources(plan)):
        totals[number] += (entry.documents, entry.num_bytes, entry.tokens)
    with LineTable(plan.names_file, str) as names:
        entries = (
            SourceEntry(name=name, documents=documents, num_bytes=num_bytes, tokens=tokens)
            for name, (documents, num_bytes, tokens) in zip(names, map(np.ndarray.tolist, totals), strict=True)
        )
        return write_sources(plan.dataset, entries).sha256


def _cut_stride(plan: PrepPlan) -> int:
    """Distance between the first tokens of neighbouring rows of a stream. (Released FIM cuts overlapping rows and makes
    rows that share no token.)
    """
    released = plan.settings.fim is not None and plan.settings.fim.mode == "released"
    return plan.settings.sequence_length if released else plan.row_stride


def _rows(plan: PrepPlan, tokens: int) -> int:
    stride = _cut_stride(plan)
    return max(0, 1 + (tokens - plan.settings.row_tokens) // stride) if tokens else 0


def _tokens_used(plan: PrepPlan, rows: int, streams: int) -> int:
    """Tokens of all streams together; a token that neighbouring rows share counts once."""
    return rows * _cut_stride(plan) + (streams if _cut_stride(plan) == plan.settings.sequence_length else 0)


def _chunk_rows(plan: PrepPlan, rows: int) -> int:
    """Rows of each chunk: all equal, and whole steps where the batch size is known."""
    chunks, step_rows = plan.settings.chunks or 1, plan.settings.global_batch_size or 1
    each = rows // chunks // step_rows * step_rows
    if not each:
        raise DataError(
            f"{plan.inputs.description}: {rows:,} rows are too few for {chunks} chunks of {step_rows} or more: give "
            "fewer --chunks"
        )
    return each


def write_one_shard(plan: PrepPlan, index: int) -> None:
    """Write shard `index` of the layout and then its record. Raises DataError, OSError."""
    layout, found = load_json(plan.layout_file), load_json(plan.survey_file)
    set_name, number, name, first, rows = layout["shards"][index]
    encoder = encoder_for(plan.tokenizer_file.read_bytes(), plan.settings.markers, plan.engine)
    settings, stride = plan.settings, _cut_stride(plan)
    start = first * stride
    stream = _cut(plan, name, layout["ends"][name], start, start + num_tokens(rows, settings.sequence_length, stride))
    if settings.fim is not None and settings.fim.mode == "released":
        stream = _released(plan, stream, first, rows, encoder)
    record = None if stream.fim is None else FimRecord(stream.fim[:, 0].astype(np.uint8), stream.fim[:, 1:])
    source, file = stream.source.astype(np.int32), stream.file.astype(np.int32)
    if plan.parent is not None:
        file[file >= 0] += plan.parent.files
    documents = Documents(stream.end, stream.id, source, found["num_sources"], file, stream.record, record)
    mask, weights = _of_labels(stream)
    info = write_shard(
        plan.dataset / shard_file(set_name, number),
        stream.tokens,
        documents,
        sequence_length=settings.sequence_length,
        row_stride=plan.row_stride,
        vocab_size=encoder.vocab_size,
        tokenizer_sha256=encoder.sha256,
        loss_mask=mask,
        token_weights=weights,
    )
    entry = ShardEntry(
        file=shard_file(set_name, number),
        num_bytes=info.num_bytes,
        sha256=info.sha256,
        digest=info.digest,
        n_examples=info.num_rows,
    )
    fsops.write_bytes(plan.shard_record(index), canonical_json(entry.model_dump(mode="json")) + b"\n")


def _of_labels(stream: Stream) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Loss mask bool [length] and weights float32 [length] of a shard; None where all are 1. A weight of 0 masks."""
    if not stream.planes:
        return None, None
    marks, weights = (stream.planes.get(name) for name in (MARKS, WEIGHTS))
    loss = np.ones(len(stream.tokens), bool) if marks is None else marks == LOSS
    if weights is not None:
        loss &= weights > 0
        weights = None if (weights[loss] == 1).all() else weights
    return None if loss.all() else loss, weights


def _cut(plan: PrepPlan, name: str, ends: list[int], start: int, stop: int) -> Stream:
    """Tokens start..stop-1 of a stream, read from the buckets that hold them; `end` counts from `start`."""
    tokens: np.ndarray | None = None
    planes: dict[str, np.ndarray] = {}
    columns: dict[str, list[np.ndarray]] = {}
    for bucket in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
        bucket_start = ends[bucket - 1] if bucket else 0
        if bucket_start >= stop:
            break
        low, high = max(start, bucket_start) - bucket_start, min(stop, ends[bucket]) - bucket_start
        if low >= high:
            continue  # the bucket is empty
        table = Table(plan.stream_file(name, bucket))
        place = slice(low + bucket_start - start, high + bucket_start - start)
        if tokens is None:
            tokens = np.empty(stop - start, table.dtype("tokens"))
        table.read_into(tokens[place], "tokens", low)
        for plane in PLANES:
            if plane in table:
                whole = planes.setdefault(plane, plain(plane, stop - start))
                table.read_into(whole[place], plane, low)
        end = table["end"]
        first, last = int(np.searchsorted(end, low, side="right")), int(np.searchsorted(end, high, side="left")) + 1
        columns.setdefault("end", []).append(np.minimum(end[first:last], high) + bucket_start - start)
        for column in ("id", "source", "file", "record", *(("fim",) if "fim" in table else ())):
            columns.setdefault(column, []).append(table.slice(column, first, last))
    assert tokens is not None
    rest = (np.concatenate(columns[name]) if name in columns else None for name in STREAM_COLUMNS)
    return Stream(tokens, planes, *rest)  # type: ignore[arg-type]


def _released(plan: PrepPlan, cut: Stream, first: int, rows: int, encoder: TextEncoder) -> Stream:
    """Rows transformed one by one, as the released scripts did."""
    from weftrain.data_prep.fim.released import released_row

    settings, ids = plan.settings, fim.fim_ids(encoder)
    assert settings.fim is not None
    tokens, lengths, of_document = [], [], []  # of_document: index, -1 for padding
    for row in range(rows):
        start = row * settings.sequence_length
        window = cut.tokens[start : start + settings.row_tokens]
        random = np.random.default_rng([settings.seed, first + row])
        made = released_row(window, encoder, ids, settings.fim.rate, settings.fim.spm_share, random)
        tokens.append(made.tokens)
        document = int(np.searchsorted(cut.end, start, side="right"))
        for count in made.document_lengths:
            if count:
                lengths.append(count)
                of_document.append(document)
            document += 1
        if made.padding:
            lengths.append(made.padding)
            of_document.append(-1)
    joined = np.concatenate(tokens).astype(encoder.dtype)
    documents = np.array(of_document)
    return with_padding(cut, joined, loss_plane(documents, np.array(lengths)), np.array(lengths), documents)


def finish(plan: PrepPlan, name: str) -> DatasetManifest:
    """Write the manifest once every shard is there, and open each set as a reader would. Raises DataError."""
    layout, found = load_json(plan.layout_file), load_json(plan.survey_file)
    encoder = encoder_for(plan.tokenizer_file.read_bytes(), plan.settings.markers, plan.engine)
    settings = plan.settings
    records = [ShardEntry.model_validate(load_json(plan.shard_record(index))) for index in range(len(layout["shards"]))]
    before = None if plan.parent is None else parent_manifest(plan)
    former = {} if before is None else before.sets
    sets = {
        name: _set_entry(plan, entry, layout, records, name, former.get(name)) for name, entry in layout["sets"].items()
    }
    inputs = found["inputs"]
    added = _added(plan, found, layout, encoder)
    if before is not None:
        added = with_parents(plan, before, added)
        put_parents_shards(plan)
    manifest = DatasetManifest(
        format="weftrain-dataset",
        version=VERSION_4 if added.tokenization.weighted_documents else VERSION,
        name=name,
        parents=added.parents,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.markers.eos,
        bos_id=encoder.markers.bos,
        sequence_length=settings.sequence_length,
        row_stride=plan.row_stride,
        packing="rows" if plan.fixed_rows else settings.packing,
        fim=_fim_prepared(plan, encoder),
        corpus=added.corpus,
        inputs_sha256=inputs["sha256"],
        inputs_skipped=inputs["skipped"],
        tokenization=added.tokenization,
        preparation=preparation(settings, plan.inputs),
        documents=added.documents,
        num_sources=found["num_sources"],
        sources_sha256=layout["sources_sha256"],
        chunks=_chunks(plan, sets["train"]),
        train=sets["train"],
        heldout=sets.get(HELDOUT),
    )
    if HELDOUT not in sets:
        fsops.remove_tree(plan.dataset / HELDOUT)
    if (template := settings.chat_template) is not None:
        fsops.write_bytes(plan.dataset / CHAT_TEMPLATE, template.encode())
    write_dataset_manifest(plan.dataset, manifest)
    write_croissant(plan.dataset, manifest)
    for set_name in manifest.sets:
        ShardSet(plan.dataset, manifest, set_name)
    return manifest


def _added(plan: PrepPlan, found: dict[str, Any], layout: dict[str, Any], encoder: TextEncoder) -> Added:
    """Counts of the new inputs, for the manifest."""
    inputs = found["inputs"]
    return Added(
        Corpus(
            sha256=inputs["corpus_sha256"],
            description=plan.inputs.description,
            licence=plan.inputs.licence,
            files=inputs["files"],
            num_bytes=inputs["num_bytes"],
        ),
        DocumentCounts(
            read=found["read"],
            failed=found["failed"],
            duplicates=layout["duplicates"],
            train=layout["sets"]["train"]["documents"],
            heldout=layout["sets"][HELDOUT]["documents"] if HELDOUT in layout["sets"] else 0,
        ),
        Tokenization(
            engine="gigatoken" if encoder.engine == "gigatoken" else "tokenizers",
            engine_version=encoder.engine_version,
            reference_documents=found["reference_documents"],
            checked_documents=found["checked_documents"],
            unknown_tokens=found["unknown_tokens"],
            cut_conversations=found["cut_conversations"],
            divided_conversations=found["divided_conversations"],
            cut_prompts=found["cut_prompts"],
            cut_answers=found["cut_answers"],
            no_preference=found["no_preference"],
            weighted_documents=found["weighted_documents"],
            reason=DIFFERED if plan.by_reference else encoder.engine_reason,
        ),
    )


def _chunks(plan: PrepPlan, train: SetEntry) -> Chunks | None:
    count = plan.settings.chunks
    if count is None:
        return None
    return Chunks(count=count, rows=train.n_examples // count, global_batch_size=plan.settings.global_batch_size)


def _fim_prepared(plan: PrepPlan, encoder: TextEncoder) -> AppliedFim | None:
    settings = plan.settings.fim
    if settings is None:
        return None
    tokens = encoder.names_of(index for index in fim.fim_ids(encoder) if index is not None)
    return AppliedFim(
        rate=settings.rate, spm_share=settings.spm_share, mode=settings.mode, seed=plan.settings.seed, tokens=tokens
    )


def _set_entry(
    plan: PrepPlan,
    entry: dict[str, Any],
    layout: dict[str, Any],
    records: list[ShardEntry],
    name: str,
    before: SetEntry | None,
) -> SetEntry:
    """A set of the layout. before: the parent's set, whose shards come first."""
    own = tuple(record for record, (set_name, *_) in zip(records, layout["shards"], strict=True) if set_name == name)
    shards = own if before is None else before.shards + own
    rows = sum(shard.n_examples for shard in shards)
    counts = {
        key: entry[key] + (0 if before is None else getattr(before, key))
        for key in ("documents", "dropped_tokens", "padding_tokens")
    }
    return SetEntry(
        id=merkle_root(shard.digest for shard in shards),
        n_examples=rows,
        tokens=rows * plan.settings.sequence_length,
        epochs=tuple(entry["epochs"]) if before is None else (rows,),
        shards=shards,
        **counts,
    )
