"""Growing a dataset: new inputs become additional shards of an existing dataset, in a folder of its own.

The parent's shards come first, unchanged and hard-linked where possible. Documents that the parent holds are dropped,
its settings and tokenizer are used, and the numbering of inputs and sources continues. The parent is only read; the
manifest records what the dataset grew from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.dataset import (
    FAILURES,
    MANIFEST,
    manifest_root,
    open_inputs,
    open_sources,
    read_dataset_manifest,
)
from weftrain.core.formats.dataset_manifest import (
    Ancestor,
    AncestorSet,
    Corpus,
    DatasetManifest,
    DocumentCounts,
    InputEntry,
    SetEntry,
    SourceEntry,
    Tokenization,
)
from weftrain.core.formats.plain_file import open_plain, real_path
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.formats.strict_model import StrictModel
from weftrain.data_prep.stages.plan import Parent, PrepPlan, power_of_two
from weftrain.data_prep.stages.settings import Settings, preparation

_KNOWN = "known"  # folder of the work folder: what tells the parent's documents apart, sorted
_BLOCK = 1 << 22  # documents whose identities are in memory at once
_MAX_PARTITIONS = 256  # files that are open at once
# keys of `preparation` that need not be equal
_FREE = {"tokenizer", "tokenizer_vocab_size", "reading_sha256", "quality", "heldout_rule"}


def open_parent(folder: Path) -> tuple[DatasetManifest, Parent]:
    """The manifest of a dataset to grow, and what a plan keeps of it. Raises DataError for one that cannot grow."""
    manifest = _read(folder)
    if len(manifest.train.epochs) > 1 or manifest.chunks is not None:
        what = (
            f"{manifest.chunks.count} chunks" if manifest.chunks is not None else f"{len(manifest.train.epochs)} epochs"
        )
        raise DataError(
            f"{folder}: was prepared in {what}, which rows at the end would break: prepare the new inputs as a "
            "dataset of their own, and name both in data.sources"
        )
    heldout = 0 if manifest.heldout is None else len(manifest.heldout.shards)
    files, shards = manifest.corpus.files, len(manifest.train.shards)
    return manifest, Parent(str(real_path(folder)), manifest_root(folder), files, manifest.num_sources, shards, heldout)


def _read(folder: Path) -> DatasetManifest:
    if re.match("[a-z][a-z0-9+.-]*:/", str(folder)):
        raise DataError(
            f"--grow {folder}: is an address: copy the dataset to this machine with `weftrain data fetch`, and name "
            "its folder"
        )
    if not (folder / MANIFEST).exists():
        raise DataError(f"--grow {folder}: holds no dataset; name the folder of one")
    return read_dataset_manifest(folder)


def as_parent(settings: Settings, manifest: DatasetManifest, rows_per_shard: int | None) -> Settings:
    """The settings with the parent's held-out rule, and its shard size unless one was given."""
    recorded = manifest.preparation.get("rows_per_shard")
    rows = recorded if rows_per_shard is None and isinstance(recorded, int) else settings.rows_per_shard
    return replace(settings, heldout_rule=manifest.heldout_rule, rows_per_shard=rows)


def check_growth(manifest: DatasetManifest, plan: PrepPlan, target: Path) -> None:
    """Raises DataError where the plan contradicts its parent's inputs or settings, or the target is the parent."""
    assert plan.parent is not None
    folder, settings = plan.parent.folder, plan.settings
    if real_path(target) == Path(folder):
        raise DataError(
            f"--grow {folder}: stays as it is, and the grown dataset gets a folder of its own: give another --name"
        )
    if settings.tokenizer != manifest.tokenizer_sha256:
        raise DataError(
            f"--grow {folder}: was prepared with another tokenizer: leave --tokenizer and --vocab-size out, and its "
            "own is taken"
        )
    for key, value in preparation(settings, plan.inputs).items():
        if key not in _FREE and manifest.preparation.get(key) != value:
            option = f"--{key.replace('_', '-')}"
            raise DataError(
                f"--grow {folder}: was prepared with {key} {manifest.preparation.get(key)!r}, not {value!r}: leave "
                f"{option} out, and its own is taken"
            )
    if plan.fixed_rows != (manifest.packing == "rows") or plan.row_stride != manifest.row_stride:
        kinds = "rows that are packed already", "documents to be packed"
        holds, given = kinds if manifest.packing == "rows" else kinds[::-1]
        raise DataError(
            f"--grow {folder}: holds {holds}, and the new inputs are {given}: prepare them as a dataset of their own"
        )


def parents_options(folder: Path) -> dict[str, Any]:
    """A dataset's settings as options of `weftrain prep`, under the names that `preparation` records."""
    manifest = _read(folder)
    return {key: value for key, value in manifest.preparation.items() if key not in _FREE}


def parent_manifest(plan: PrepPlan) -> DatasetManifest:
    """The manifest of the plan's parent. Raises DataError where it has changed since the plan was made."""
    assert plan.parent is not None
    folder = Path(plan.parent.folder)
    if manifest_root(folder) != plan.parent.root:
        raise DataError(
            f"{folder}: is another dataset than when this was begun; put it back, or remove {plan.folder} and prepare "
            "again"
        )
    return read_dataset_manifest(folder)


# -- inputs and sources, numbered on


def parents_inputs(plan: PrepPlan) -> tuple[Iterator[InputEntry], Iterator[InputEntry]]:
    """Two streams: files that the parent read, and files that it skipped."""
    if plan.parent is None:
        return iter(()), iter(())
    manifest = parent_manifest(plan)
    folder, files = Path(plan.parent.folder), plan.parent.files
    return islice(open_inputs(folder, manifest), files), islice(open_inputs(folder, manifest), files, None)


def parents_sources(plan: PrepPlan) -> Iterator[SourceEntry]:
    if plan.parent is not None:
        yield from open_sources(Path(plan.parent.folder), parent_manifest(plan))


def parents_failures(plan: PrepPlan) -> Iterator[bytes]:
    """The parent's failure records, in blocks. Raises DataError."""
    if plan.parent is None or not (path := Path(plan.parent.folder) / FAILURES).exists():
        return
    try:
        with open_plain(path) as file:
            while block := file.read(1 << 20):
                yield block
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}; put it back, or remove it") from error


# -- documents that the parent holds


def index_documents(plan: PrepPlan) -> None:
    """Write the sorted identities of the parent's documents, for `is_known`.

    They are distributed over files by their leading bits, and then each file is sorted. Memory: the tables of one shard
    and _BLOCK identities. Raises DataError, OSError.
    """
    if plan.parent is None or plan.settings.order == "as_read":
        return
    manifest, place = parent_manifest(plan), plan.work / _KNOWN
    pieces = (
        manifest.documents.train + manifest.documents.heldout + plan.parent.train_shards + plan.parent.heldout_shards
    )
    bits = min(_MAX_PARTITIONS, power_of_two(-(-pieces // _BLOCK))).bit_length() - 1
    fsops.remove_tree(place)  # of an interrupted run
    fsops.make_dirs(place)
    paths = [place / f"{index:03d}" for index in range(1 << bits)]
    files = [fsops.FileWriter(path) for path in paths]
    bounds = np.array([index << (64 - bits) for index in range(1, 1 << bits)], np.uint64)
    for identities in _identities(Path(plan.parent.folder), manifest):
        ordered = identities[np.argsort(identities[:, 0])]
        cuts = [0, *np.searchsorted(ordered[:, 0], bounds).tolist(), len(ordered)]
        for file, (start, stop) in zip(files, pairwise(cuts), strict=True):
            if start < stop:
                file.write(ordered[start:stop].tobytes())
    with fsops.FileWriter(place / "high") as high, fsops.FileWriter(place / "low") as low:
        for path, file in zip(paths, files, strict=True):
            file.close()
            found = np.fromfile(path, np.uint64).reshape(-1, 2)
            found = found[np.argsort(found[:, 0])]
            high.write(found[:, 0].tobytes())
            low.write(found[:, 1].tobytes())
            fsops.remove_file(path)


def _identities(folder: Path, manifest: DatasetManifest) -> Iterator[np.ndarray]:
    """For each shard, the identities of its documents as uint64 [n, 2]."""
    for set_name in manifest.sets:
        for reader in ShardSet(folder, manifest, set_name).readers():
            table = reader.documents()
            yield _numbers(table.id[table.file >= 0])


def _numbers(identities: np.ndarray) -> np.ndarray:
    """uint8 [n, 16] -> uint64 [n, 2] in the same sort order."""
    return np.ascontiguousarray(identities).view(">u8").astype(np.uint64)


def is_known(plan: PrepPlan, content: np.ndarray) -> np.ndarray:
    """Whether the parent holds documents: SHA-256 uint8 [n, 32] -> bool [n]. Compares the 16 bytes that shards keep of
    each hash, and reads only the blocks of identities that can match.
    """
    known = np.zeros(len(content), np.bool_)
    if plan.parent is None or plan.settings.order == "as_read" or not len(content):
        return known
    wanted = _numbers(content[:, :16])
    order = np.argsort(wanted[:, 0])
    needles = wanted[order]
    found = np.zeros(len(needles), np.bool_)
    place = plan.work / _KNOWN
    with open(place / "high", "rb") as high_file, open(place / "low", "rb") as low_file:
        while len(high := np.fromfile(high_file, np.uint64, _BLOCK)):
            low = np.fromfile(low_file, np.uint64, _BLOCK)
            begin, end = (
                int(np.searchsorted(needles[:, 0], high[0], "left")),
                int(np.searchsorted(needles[:, 0], high[-1], "right")),
            )
            found[begin:end] |= _contained(needles[begin:end], high, low)
    known[order] = found
    return known


def _contained(needles: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Which needles, uint64 [n, 2], are among (high, low), which are sorted by high."""
    found = np.zeros(len(needles), np.bool_)
    at = np.searchsorted(high, needles[:, 0], "left")
    open_ones = np.flatnonzero(at < len(high))
    while len(open_ones):  # nearly always once: several share their first half by one chance in 2^64
        same = high[at[open_ones]] == needles[open_ones, 0]
        open_ones = open_ones[same]
        found[open_ones] |= low[at[open_ones]] == needles[open_ones, 1]
        at[open_ones] += 1
        open_ones = open_ones[~found[open_ones] & (at[open_ones] < len(high))]
    return found


# -- the manifest


def put_parents_shards(plan: PrepPlan) -> None:
    """Link or copy the parent's shards into the new dataset. Raises DataError, OSError."""
    assert plan.parent is not None
    manifest, folder = parent_manifest(plan), Path(plan.parent.folder)
    for set_name, entry in manifest.sets.items():
        fsops.make_dirs(plan.dataset / set_name)
        for shard in entry.shards:
            fsops.link_or_copy(folder / shard.file, plan.dataset / shard.file)
        fsops.sync_dir(plan.dataset / set_name)


@dataclass(frozen=True)
class Added:
    """Counts of the new inputs for the manifest; the corpus' files, bytes and root already cover all inputs."""

    corpus: Corpus
    documents: DocumentCounts
    tokenization: Tokenization
    parents: tuple[Ancestor, ...] = ()


def with_parents(plan: PrepPlan, before: DatasetManifest, own: Added) -> Added:
    """The counts of parent and new inputs together."""
    assert plan.parent is not None
    parent = Ancestor(
        name=before.name,
        root=plan.parent.root,
        files=before.corpus.files,
        num_sources=before.num_sources,
        train=_ancestor_set(before.train),
        heldout=None if before.heldout is None else _ancestor_set(before.heldout),
    )
    texts = {key: joined(getattr(before.corpus, key), getattr(own.corpus, key)) for key in ("description", "licence")}
    return Added(
        own.corpus.model_copy(update=texts),
        own.documents.model_copy(update=_sums(before.documents, own.documents, tuple(DocumentCounts.model_fields))),
        own.tokenization.model_copy(
            update=_sums(
                before.tokenization,
                own.tokenization,
                tuple(key for key in Tokenization.model_fields if key not in ("engine", "engine_version", "reason")),
            )
        ),
        (*before.parents, parent),
    )


def _sums(before: StrictModel, own: StrictModel, keys: Sequence[str]) -> dict[str, int]:
    return {key: getattr(before, key) + getattr(own, key) for key in keys}


def _ancestor_set(entry: SetEntry) -> AncestorSet:
    return AncestorSet(id=entry.id, n_examples=entry.n_examples, shards=len(entry.shards))


def joined(before: str, added: str) -> str:
    """Descriptions or licences of both, each part once."""
    return before if added in before.split("; ") else f"{before}; {added}"
