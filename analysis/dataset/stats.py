"""What a prepared dataset holds, in numbers: counted from its shards, one after the other, and from its manifest.

Lengths are of document pieces as stored, so a document cut at a shard's end counts twice; the manifest's counts,
printed beside them, are of whole documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weftrain.core.formats.dataset import open_sources
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.core.formats.shard_set import open_set

LENGTH_EDGES = np.concatenate([[0], 2 ** np.arange(0, 27)])  # tokens
SHOWN_SOURCES = 20  # a dataset may have a million


@dataclass(frozen=True)
class DatasetStats:
    """Counts of one set. length_counts: documents by length in LENGTH_EDGES. token_counts: int64 [vocab_size].

    tokens_by_source: the SHOWN_SOURCES largest, without padding; other_sources, other_tokens: the rest. fim: documents
    by mode. bytes_per_token: of the files, everything included.
    """

    manifest: DatasetManifest
    set_name: str
    documents: int
    tokens_by_source: dict[str, int]
    other_sources: int
    other_tokens: int
    length_counts: np.ndarray
    length_quantiles: dict[str, int]
    token_counts: np.ndarray
    fim: dict[str, int]
    padding_tokens: int
    bytes_per_token: float


def dataset_stats(
    folder: Path, set_name: str = "train", progress: Callable[[int, int], None] | None = None
) -> DatasetStats:
    """Count a set and verify it, one shard in memory at a time. progress(shards done, all). Raises DataError."""
    manifest, shards = open_set(folder, set_name)
    lengths: list[np.ndarray] = []
    by_source = np.zeros(manifest.num_sources, np.int64)
    token_counts = np.zeros(manifest.vocab_size, np.int64)
    modes = np.zeros(3, np.int64)
    padding = total = 0
    for number, reader in enumerate(shards.readers(), start=1):
        table = reader.documents()
        length = np.diff(table.end, prepend=0)
        real = table.file >= 0
        padding += int(length[~real].sum())
        lengths.append(length[real].astype(np.int32))
        by_source += np.bincount(table.source[real], length[real], manifest.num_sources).astype(np.int64)
        if table.fim is not None:
            modes += np.bincount(table.fim.mode[real], minlength=3)
        stop = int(table.end[-1])
        total += stop
        for start in range(0, stop, 1 << 22):
            token_counts += np.bincount(
                reader.tokens(start, min(start + (1 << 22), stop)), minlength=manifest.vocab_size
            )
        if progress is not None:
            progress(number, len(shards.entry.shards))
    sources = open_sources(folder, manifest)
    largest = np.argsort(-by_source, kind="stable")[:SHOWN_SOURCES]
    largest = largest[by_source[largest] > 0]
    joined = np.concatenate(lengths)
    quantiles = {
        name: int(np.quantile(joined, share))
        for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    return DatasetStats(
        manifest=manifest,
        set_name=set_name,
        documents=len(joined),
        tokens_by_source={sources[index].name: int(by_source[index]) for index in largest.tolist()},
        other_sources=max(0, int(np.count_nonzero(by_source)) - SHOWN_SOURCES),
        other_tokens=int(by_source.sum() - by_source[largest].sum()),
        length_counts=np.histogram(joined, LENGTH_EDGES)[0],
        length_quantiles=quantiles | {"mean": round(float(joined.mean())), "max": int(joined.max())},
        token_counts=token_counts,
        fim=dict(zip(("plain", "PSM", "SPM"), modes.tolist(), strict=True)) if manifest.fim is not None else {},
        padding_tokens=padding,
        bytes_per_token=sum(shard.num_bytes for shard in shards.entry.shards) / total,
    )


def stats_lines(stats: DatasetStats) -> list[str]:
    """The numbers as lines of text, without the sources."""
    manifest, entry = stats.manifest, stats.manifest.sets["train" if stats.set_name == "train" else "heldout"]
    counts, corpus = manifest.documents, manifest.corpus
    lines = [
        f"dataset      {manifest.name}: {corpus.description}, licence {corpus.licence}",
        f"id           {entry.id}",
        f"corpus       {corpus.files:,} files, {corpus.num_bytes:,} bytes, {corpus.sha256[:16]}",
        f"tokenizer    {manifest.tokenizer_sha256[:16]}, {manifest.vocab_size:,} ids; {manifest.tokenization.engine} "
        f"{manifest.tokenization.engine_version}, {manifest.tokenization.checked_documents:,} documents compared with "
        "the reference",
        f"documents    {counts.read:,} read, {counts.failed:,} failed, {counts.duplicates:,} duplicates; "
        f"{counts.train:,} train, {counts.heldout:,} held out",
        f"markers      {_markers(manifest)}; held out by rule {manifest.heldout_rule}",
        f"{stats.set_name:<12} {entry.n_examples:,} rows x {manifest.sequence_length}, {manifest.packing}; "
        f"{stats.padding_tokens:,} tokens "
        f"of padding, {entry.dropped_tokens:,} dropped at the end; {stats.bytes_per_token:.4f} bytes a token",
        "lengths      " + ", ".join(f"{name} {value:,}" for name, value in stats.length_quantiles.items()) + " tokens",
    ]
    about = [
        f"grew from    {parent.name}: its {parent.train.n_examples:,} training rows are the first, id {parent.train.id}"
        for parent in manifest.parents
    ]
    if manifest.inputs_skipped:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest.inputs_skipped.items())
        about.append(
            f"skipped      {sum(manifest.inputs_skipped.values()):,} files: {skipped}; inputs.jsonl names them"
        )
    lines[3:3] = about
    if weighted := manifest.tokenization.weighted_documents:
        lines.append(f"weights      {weighted:,} documents have a weight of loss other than 0 and 1")
    if len(entry.epochs) > 1:
        lines.append("epochs       " + ", ".join(f"{rows:,}" for rows in entry.epochs) + " rows")
    if manifest.chunks is not None:
        steps = (
            ""
            if (first := manifest.chunks.steps(0)) is None
            else f" = {first[1]:,} steps of {manifest.chunks.global_batch_size:,}"
        )
        lines.append(f"chunks       {manifest.chunks.count:,} x {manifest.chunks.rows:,} rows{steps}")
    if manifest.fim is not None:
        shares = ", ".join(f"{name} {count / max(1, sum(stats.fim.values())):.2%}" for name, count in stats.fim.items())
        lines.append(
            f"fim          {manifest.fim.mode}, rate {manifest.fim.rate}, SPM share {manifest.fim.spm_share}: {shares}"
        )
    return lines


def stats_json(stats: DatasetStats) -> dict[str, object]:
    """The numbers for programs (docs/json-output.md); length_counts has an entry for each LENGTH_EDGES interval."""
    manifest, entry = stats.manifest, stats.manifest.sets["train" if stats.set_name == "train" else "heldout"]
    return {
        "schema_version": 1,
        "dataset": manifest.name,
        "set": stats.set_name,
        "dataset_id": entry.id,
        "rows": entry.n_examples,
        "sequence_length": manifest.sequence_length,
        "tokens": entry.tokens,
        "documents": stats.documents,
        "padding_tokens": stats.padding_tokens,
        "dropped_tokens": entry.dropped_tokens,
        "unknown_tokens": manifest.tokenization.unknown_tokens,
        "weighted_documents": manifest.tokenization.weighted_documents,
        "bytes_per_token": stats.bytes_per_token,
        "tokens_by_source": stats.tokens_by_source,
        "other_sources": stats.other_sources,
        "other_tokens": stats.other_tokens,
        "lengths": stats.length_quantiles,
        "length_edges": LENGTH_EDGES.tolist(),
        "length_counts": stats.length_counts.tolist(),
        "fim": stats.fim,
        "vocab_size": manifest.vocab_size,
        "token_ids_used": int(np.count_nonzero(stats.token_counts)),
    }


def _markers(manifest: DatasetManifest) -> str:
    """The ids with which documents begin and end. Rows that were packed elsewhere hold what they hold."""
    ends = [
        f"{what} with id {index}"
        for what, index in (("begin", manifest.bos_id), ("end", manifest.eos_id))
        if index is not None
    ]
    return f"documents {' and '.join(ends)}"


def source_lines(stats: DatasetStats) -> list[str]:
    """The largest sources as lines of text, and the rest together."""
    total = sum(stats.tokens_by_source.values()) + stats.other_tokens
    rows = [(name, count) for name, count in stats.tokens_by_source.items()]
    if stats.other_sources:
        rows.append((f"{stats.other_sources:,} more", stats.other_tokens))
    return [f"source       {name:<24} {count:>16,} tokens {count / total:8.3%}" for name, count in rows]
