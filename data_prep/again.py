"""Preparing a dataset again from its inputs, to see that its tokens are those of the texts it names.

Preparation is a function of inputs and settings, and a manifest records the settings. So the inputs are tokenised and
packed anew in a temporary folder, with a tokenizer trained anew where the dataset's own was, and every shard must have
the same SHA-256. What differs is named by file, and by the row of the file where both have it. A dataset that grew is
grown again, with the tokenizer that it has: who trained that is recorded by its first parent alone.

With a share, only so many shards, drawn at random, are compared (again_sample.py).

What a manifest does not record is how records were read (fields, formats): it has only a hash of that, so whoever
checks gives the same options again. A dataset that was split by an older rule is refused by name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import TOKENIZER, read_dataset_manifest
from weftrain.core.formats.dataset_manifest import SetName
from weftrain.core.formats.shard_reader import read_rows
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep import heldout
from weftrain.data_prep.again_inputs import (
    READING,
    GivenInputs,
    Place,
    RecordedDataset,
    and_more,
    given_inputs,
    recorded_settings,
)
from weftrain.data_prep.again_sample import check_shards, drawn_shards
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.stages.executors import Executor
from weftrain.data_prep.stages.plan import Progress, no_progress

_COUNTED = ("documents", "train", "heldout", "chunks", "fim", "vocab_size", "eos_id", "bos_id")
_OF_CORPUS = ("sha256", "files", "num_bytes")
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Sample:
    """Which shards are prepared again: a share of them, at least one, drawn with a seed."""

    share: float
    seed: int


@dataclass(frozen=True)
class PreparedAgain:
    """A dataset whose inputs gave the same bytes again. files, documents: that were read for it. shards: the compared
    ones, of num_shards. told_sources: files of which the name of the source is the dataset's word.
    """

    files: int
    documents: int
    shards: tuple[str, ...]
    num_shards: int
    told_sources: int


def check_inputs_again(
    folder: Path,
    addresses: Sequence[str],
    reading: Mapping[str, str],
    executor: Executor,
    *,
    sample: Sample | None = None,
    shards_here: bool = True,
    progress: Progress = no_progress,
) -> PreparedAgain:
    """Prepare the dataset in `folder` again from the files at these addresses, and compare. shards_here: whether its
    shards are in the folder, which names the rows that differ; without them their hashes are compared.

    reading: of READING, as they were given to `weftrain prep`. Without `sample` needs as much room below TMPDIR as
    preparing does. Raises DataError for the first difference, naming file and row.
    """
    there = RecordedDataset(folder, read_dataset_manifest(folder))
    if there.manifest.heldout_rule != heldout.RULE:
        raise DataError(
            f"{folder}: was split by the held-out rule {there.manifest.heldout_rule} of an earlier version: check it "
            "with it"
        )
    shards = [(name, shard) for name, entry in there.manifest.sets.items() for shard in entry.shards]
    with tempfile.TemporaryDirectory(prefix="weftrain-again-") as work:
        if sample is not None:
            if not shards_here:
                raise DataError(
                    f"{folder}: a share of its shards needs them, and they are not here: leave --sample out"
                )
            chosen = drawn_shards(there, sample.share, sample.seed)
            given = given_inputs(there, addresses, reading, shards_here)
            files, documents = check_shards(there, given, chosen, Path(work), progress)
            names = tuple(there.manifest.sets[name].shards[index].file for name, index in chosen)
            return PreparedAgain(files, documents, names, len(shards), given.told_sources)
        given = given_inputs(there, addresses, reading, shards_here)
        try:
            made = _made_again(there, given, Path(work), executor, progress)
        except DataError as error:
            raise DataError(f"{', '.join(addresses)}: cannot be prepared as {folder} was: {error}") from error
        _compare(there, RecordedDataset(made.folder, made.manifest), shards_here)
    counts = there.manifest.documents
    names = tuple(shard.file for _, shard in shards)
    return PreparedAgain(
        there.manifest.corpus.files, counts.train + counts.heldout, names, len(shards), given.told_sources
    )


def _made_again(
    there: RecordedDataset, given: GivenInputs, work: Path, executor: Executor, progress: Progress
) -> Prepared:
    """The dataset anew below `work`: in one piece, or grown as often as it was. Raises DataError."""
    settings, made = recorded_settings(there), None
    for number, files in enumerate(there.generations()):
        made = prepare(
            given.of(files),
            work,
            name=f"again{number}",
            grow=None if made is None else made.folder,
            executor=executor,
            progress=progress,
            **settings,
        )
        assert made is not None
    assert made is not None
    return made


def _compare(there: RecordedDataset, again: RecordedDataset, shards_here: bool) -> None:
    """Raises DataError for the first difference, what the inputs are first."""
    _compare_settings(there, again)
    _compare_files(there, again, shards_here)
    if again.manifest.tokenizer_sha256 != there.manifest.tokenizer_sha256:
        raise DataError(
            f"{there.folder / TOKENIZER}: is not the tokenizer that is trained on its inputs: it was altered, or a "
            "different version of `tokenizers` trains otherwise"
        )
    for set_name, entry in there.manifest.sets.items():
        for index, shard in enumerate(entry.shards):
            made = again.manifest.sets.get(set_name)
            if made is None or index >= len(made.shards) or made.shards[index].sha256 != shard.sha256:
                where = _row(there, again, set_name) if shards_here else ""
                raise DataError(f"{there.folder / shard.file}: does not follow from its inputs{where}: it was altered")
    corpora = there.manifest.corpus, again.manifest.corpus
    wrong = [f"corpus.{key}" for key in _OF_CORPUS if len({getattr(one, key) for one in corpora}) > 1]
    wrong += [key for key in _COUNTED if getattr(there.manifest, key) != getattr(again.manifest, key)]
    for told, made_again in zip(there.manifest.parents, again.manifest.parents, strict=True):
        if (told.num_sources, told.train, told.heldout) != (
            made_again.num_sources,
            made_again.train,
            made_again.heldout,
        ):
            wrong.append(f"parents: {told.name}")
    if wrong:
        raise DataError(f"{there.folder}: manifest.json: {wrong[0]} does not follow from its inputs: it was altered")
    if again.manifest.sources_sha256 != there.manifest.sources_sha256:
        raise DataError(f"{there.folder}: its list of sources does not follow from its inputs: was --reading left out?")


def _compare_settings(there: RecordedDataset, again: RecordedDataset) -> None:
    told, made = there.manifest.preparation, again.manifest.preparation
    for key in sorted(made.keys() | told.keys()):
        if told.get(key) != made.get(key):
            hint = f"give what was given to `weftrain prep` with --reading ({', '.join(READING)})"
            why = hint if key == "reading_sha256" else f"{key} is {told.get(key)!r}, and here {made.get(key)!r}"
            raise DataError(f"{there.folder}: its inputs were prepared otherwise: {why}")


def _compare_files(there: RecordedDataset, again: RecordedDataset, shards_here: bool) -> None:
    """The files of both have the same names already, in the same order."""
    before, now = there.entries(), again.entries()
    changed = [place for place, entry in enumerate(before) if entry.sha256 != now[place].sha256]
    if not changed:
        return
    words = there.other_file(changed)
    if not shards_here:
        raise DataError(f"{words}: give the files that it was made of")
    told, made = there.rows(changed), again.rows(changed)
    names = [entry.name for entry in before]
    rows = [
        *_only_in(told, made, names, "of the dataset's is not in it", shown=True),
        *_only_in(made, told, names, "of it is not in the dataset", shown=False),
    ]
    raise DataError(f"{words}: {'; '.join(rows) or 'its documents are the same'}: give the files that it was made of")


def _only_in(
    one: Mapping[Place, tuple[bytes, str]],
    other: Mapping[Place, tuple[bytes, str]],
    names: Sequence[str],
    words: str,
    *,
    shown: bool,
) -> Iterator[str]:
    """The first document that only one has, by the name of its file and its row there. shown: with its shard."""
    known = {identity for identity, _ in other.values()}
    found = sorted(place for place, (identity, _) in one.items() if identity not in known)
    if found:
        file, row = found[0]
        shard = f" ({one[found[0]][1]} has it)" if shown else ""
        yield f"{names[file]}: row {row} {words}{shard}{and_more(found)}"


def _row(there: RecordedDataset, again: RecordedDataset, set_name: SetName) -> str:
    """The first row whose tokens differ, and the document that begins in it or goes on there, in words."""
    if set_name not in again.manifest.sets:
        return ""
    told, made = (ShardSet(one.folder, one.manifest, set_name) for one in (there, again))
    names = [entry.name for entry in there.entries()]
    for first in range(0, min(told.num_rows, made.num_rows), _BLOCK_ROWS):
        numbers = np.arange(first, min(first + _BLOCK_ROWS, told.num_rows, made.num_rows), dtype=np.int64)
        ids = [_ids(shards, numbers) for shards in (told, made)]
        if differing := np.flatnonzero((ids[0] != ids[1]).any(axis=1)).tolist():
            row, column = differing[0], int(np.flatnonzero(ids[0][differing[0]] != ids[1][differing[0]])[0])
            _, within = told.locate(first + row)
            reader, (position,) = told.positions(numbers[row : row + 1])
            table = reader[0].documents()
            document = int(np.searchsorted(table.end, position + column, "right"))
            origin = names[int(table.file[document])] if table.file[document] >= 0 else "padding"
            record = int(table.record[document])
            return f" (row {within}, token {column}, of {origin}, row {record})"
    if told.num_rows != made.num_rows:
        return f" ({told.num_rows:,} rows, and {made.num_rows:,} from the inputs)"
    return " (its ids do, and what it says of their origin or loss does not)"


def _ids(shards: ShardSet, numbers: np.ndarray) -> np.ndarray:
    readers, positions = shards.positions(numbers)
    ids = np.empty((len(numbers), shards.manifest.sequence_length + 1), dtype=np.int64)
    read_rows(ids, readers, positions)
    return ids
