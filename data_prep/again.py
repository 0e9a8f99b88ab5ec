"""Preparing a dataset again from its inputs, to see that its tokens are those of the texts it names.

Preparation is a function of inputs and settings, and a manifest records the settings. So the inputs are tokenised and
packed anew in a temporary folder, with a tokenizer trained anew where the dataset's own was, and every shard must have
the same SHA-256. What differs is named by file, and by the row of the file where both have it.

What a manifest does not record is how records were read (fields, formats): it has only a hash of that, so whoever
checks gives the same options again. A dataset that grew, or was split by an older rule, is refused by name.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import TOKENIZER, open_inputs, read_chat_template, read_dataset_manifest
from weftrain.core.formats.dataset_manifest import DatasetManifest, FimSettings, InputEntry, SetName
from weftrain.core.formats.shard_reader import read_rows
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep import heldout
from weftrain.data_prep.pipeline import prepare
from weftrain.data_prep.readers.corpus import embedded_inputs
from weftrain.data_prep.readers.listing import Wanted, find_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages.executors import Executor
from weftrain.data_prep.stages.plan import Progress, no_progress
from weftrain.data_prep.stages.settings import Conversations, Inputs, Preferences

EMBEDDED = "embedded"  # in place of an address: the running interpreter's own library
READING = ("text_key", "source_key", "weight_key", "tokens_key", "tokens_dtype", "format", "suffix", "source")
_COUNTED = ("documents", "corpus", "train", "heldout", "chunks", "fim", "vocab_size", "eos_id", "bos_id")
_BLOCK_ROWS = 4096
_Place = tuple[str, int]  # name of an input, and the row in it


@dataclass(frozen=True)
class PreparedAgain:
    """A dataset whose inputs gave the same bytes again."""

    files: int
    documents: int
    shards: int


def check_inputs_again(
    folder: Path,
    addresses: Sequence[str],
    reading: Mapping[str, str],
    executor: Executor,
    *,
    shards_here: bool = True,
    progress: Progress = no_progress,
) -> PreparedAgain:
    """Prepare the dataset in `folder` again from the files at these addresses, and compare. shards_here: whether its
    shards are in the folder, which names the rows that differ; without them their hashes are compared.

    reading: of READING, as they were given to `weftrain prep`. Needs as much room below TMPDIR as preparing does.
    Raises DataError for the first difference, naming file and row.
    """
    manifest = read_dataset_manifest(folder)
    _check_supported(folder, manifest)
    with tempfile.TemporaryDirectory(prefix="weftrain-again-") as work:
        inputs = _inputs(folder, manifest, addresses, reading)
        arguments = _arguments(folder, manifest)
        try:
            made = prepare(inputs, Path(work), name="again", executor=executor, progress=progress, **arguments)
        except DataError as error:
            raise DataError(f"{', '.join(addresses)}: cannot be prepared as {folder} was: {error}") from error
        assert made is not None
        again = _Dataset(made.folder, made.manifest)
        _compare(_Dataset(folder, manifest), again, shards_here)
    shards = sum(len(entry.shards) for entry in manifest.sets.values())
    return PreparedAgain(manifest.corpus.files, manifest.documents.train + manifest.documents.heldout, shards)


@dataclass(frozen=True)
class _Dataset:
    folder: Path
    manifest: DatasetManifest

    def entries(self) -> list[InputEntry]:
        """The files that were read."""
        with open_inputs(self.folder, self.manifest) as table:
            return list(islice(table, self.manifest.corpus.files))

    def rows(self, files: Sequence[InputEntry]) -> dict[_Place, bytes]:
        """Of these files, the documents that are in the dataset: where each is, and its identity."""
        wanted = {entry.name for entry in files}
        names = {index: entry.name for index, entry in enumerate(self.entries()) if entry.name in wanted}
        found: dict[_Place, bytes] = {}
        for set_name in self.manifest.sets:
            for reader in ShardSet(self.folder, self.manifest, set_name).readers():
                table = reader.documents()
                for place in np.flatnonzero(np.isin(table.file, list(names))).tolist():
                    found[names[int(table.file[place])], int(table.record[place])] = table.id[place].tobytes()
        return found


def _check_supported(folder: Path, manifest: DatasetManifest) -> None:
    if manifest.parents:
        raise DataError(
            f"{folder}: grew from {manifest.parents[-1].name}: only a dataset that was prepared in one piece can be "
            "prepared again"
        )
    if manifest.heldout_rule != heldout.RULE:
        raise DataError(
            f"{folder}: was split by the held-out rule {manifest.heldout_rule} of an earlier version: check it with it"
        )


def _inputs(folder: Path, manifest: DatasetManifest, addresses: Sequence[str], reading: Mapping[str, str]) -> Inputs:
    """The inputs as `weftrain prep` lists them. Raises DataError."""
    if unknown := sorted(set(reading) - set(READING)):
        raise DataError(f"--reading {unknown[0]}: how inputs were read is told by {', '.join(READING)}")
    told = manifest.preparation
    sides = 2 if told.get("preferences") == "pairs" else 1
    preferences = None if told.get("preferences") is None else True
    options = ReadOptions(
        text_key=reading.get("text_key", "text"),
        source_key=reading.get("source_key"),
        weight_key=reading.get("weight_key"),
        tokens_key=reading.get("tokens_key"),
        tokens_dtype=reading.get("tokens_dtype"),
        sequence_length=manifest.sequence_length // sides,
        normalise=_names(told.get("normalise")),
        conversations=None if told.get("chat_template") is None or preferences else True,
        preferences=preferences,
    )
    quality = told.get("quality")
    more: dict[str, Any] = {"options": options, "quality": None if quality is None else str(quality)}
    description, licence = manifest.corpus.description, manifest.corpus.licence
    if tuple(addresses) == (EMBEDDED,):
        return Inputs(tuple(embedded_inputs()[0]), description, licence, **more)
    suffixes = (reading["suffix"],) if "suffix" in reading else ()
    keys = _record_keys(options)
    wanted = Wanted(tuple(addresses), reading.get("source"), suffixes, reading.get("format"), keys)
    listed = find_inputs([wanted])
    read = Counter(entry.name for entry in _Dataset(folder, manifest).entries())
    if lacking := sorted(read.keys() - {file.name for file in listed.files}):
        raise DataError(
            f"{', '.join(addresses)}: {lacking[0]} is missing, which {folder} was made of"
            f"{_more(lacking)}: names begin with the folder that was named to `weftrain prep`"
        )
    if added := sorted({file.name for file in listed.files} - read.keys()):
        raise DataError(
            f"{', '.join(addresses)}: {added[0]} is none of the files that {folder} was made of{_more(added)}"
        )
    return Inputs(listed.files, description, licence, skipped=listed.skipped, **more)


def _record_keys(options: ReadOptions) -> tuple[str, ...]:
    """The fields by which JSON records are known."""
    from weftrain.data_prep.conversations.messages import FIELDS
    from weftrain.data_prep.conversations.preferences import FIELDS as OF_PREFERENCES

    if options.preferences:
        return OF_PREFERENCES
    return FIELDS if options.conversations else (options.text_key,)


def _arguments(folder: Path, manifest: DatasetManifest) -> dict[str, Any]:
    """The recorded settings as arguments of prepare()."""
    told: dict[str, Any] = dict(manifest.preparation)
    sides = 2 if told.get("preferences") == "pairs" else 1
    trained = told["tokenizer"] == "trained"
    rate = told.get("fim_rate")
    fim = None if rate is None else FimSettings(rate=rate, spm_share=told["fim_spm_share"], mode=told["fim_mode"])
    conversations, preferences = _of_records(folder, manifest)
    keys = (
        "eos",
        "bos",
        "heldout_fraction",
        "rows_per_shard",
        "seed",
        "order",
        "epochs",
        "chunks",
        "global_batch_size",
    )
    return {
        **{key: told[key] for key in keys if key in told},
        "packing": told["packing"],
        "tokenizer": None if trained else folder / TOKENIZER,
        "vocab_size": told["tokenizer_vocab_size"] if trained else None,
        "sequence_length": told["sequence_length"] // sides,
        "fim": fim,
        "fim_tokens": _names(told.get("fim_tokens")),
        "conversations": conversations,
        "preferences": preferences,
        "max_failures": manifest.documents.failed,
    }


def _of_records(folder: Path, manifest: DatasetManifest) -> tuple[Conversations | None, Preferences | None]:
    told: dict[str, Any] = dict(manifest.preparation)
    template, ends = read_chat_template(folder, manifest), _names(told.get("turn_end"))
    if (rows := told.get("preferences")) is not None:
        named = (None, None, ()) if template is None else (template, "the recorded template", ends)
        return None, Preferences(rows, told["max_prompt"], told["keep_prompt"], told["too_long"], *named)
    if template is None:
        return None, None
    return Conversations(template, "the recorded template", ends, told["loss"], told["too_long"]), None


def _compare(there: _Dataset, again: _Dataset, shards_here: bool) -> None:
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
    for key in _COUNTED:
        told, made_again = getattr(there.manifest, key), getattr(again.manifest, key)
        if told != made_again:
            raise DataError(f"{there.folder}: manifest.json: {key} does not follow from its inputs: it was altered")
    if again.manifest.sources_sha256 != there.manifest.sources_sha256:
        raise DataError(f"{there.folder}: its list of sources does not follow from its inputs: was --reading left out?")


def _compare_settings(there: _Dataset, again: _Dataset) -> None:
    told, made = there.manifest.preparation, again.manifest.preparation
    for key in sorted(made.keys() | told.keys()):
        if told.get(key) != made.get(key):
            hint = f"give what was given to `weftrain prep` with --reading ({', '.join(READING)})"
            why = hint if key == "reading_sha256" else f"{key} is {told.get(key)!r}, and here {made.get(key)!r}"
            raise DataError(f"{there.folder}: its inputs were prepared otherwise: {why}")


def _compare_files(there: _Dataset, again: _Dataset, shards_here: bool) -> None:
    """The files of both have the same names already."""
    before, now = there.entries(), {entry.name: entry for entry in again.entries()}
    changed = [entry for entry in before if entry.sha256 != now[entry.name].sha256]
    if not changed:
        return
    words = f"{changed[0].name}: is not the file that {there.folder} was made of{_more(changed)}"
    if not shards_here:
        raise DataError(f"{words}: give the files that it was made of")
    told, made = there.rows(changed), again.rows(changed)
    rows = [
        *_only_in(told, made, "of the dataset's is not in it"),
        *_only_in(made, told, "of it is not in the dataset"),
    ]
    raise DataError(f"{words}: {'; '.join(rows) or 'its documents are the same'}: give the files that it was made of")


def _only_in(one: Mapping[_Place, bytes], other: Mapping[_Place, bytes], words: str) -> Iterator[str]:
    """The first document that only one has, by the name of its file and its row there."""
    known = set(other.values())
    found = sorted(place for place, identity in one.items() if identity not in known)
    if found:
        yield f"{found[0][0]}: row {found[0][1]} {words}{_more(found)}"


def _row(there: _Dataset, again: _Dataset, set_name: SetName) -> str:
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
    return f" ({told.num_rows:,} rows, and {made.num_rows:,} from the inputs)" if told.num_rows != made.num_rows else ""


def _ids(shards: ShardSet, numbers: np.ndarray) -> np.ndarray:
    readers, positions = shards.positions(numbers)
    ids = np.empty((len(numbers), shards.manifest.sequence_length + 1), dtype=np.int64)
    read_rows(ids, readers, positions)
    return ids


def _more(found: Sequence[Any]) -> str:
    return f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""


def _names(told: Any) -> tuple[str, ...]:
    return tuple(filter(None, str(told or "").split(",")))
