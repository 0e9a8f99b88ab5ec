"""The inputs and settings of a recorded dataset, as preparing it again takes them (again.py, again_sample.py).

Files are known by their names, and taken in the order that the dataset records, whatever the order they are given in.
A dataset that grew may have read several files of one name: these are told apart by the order in which they are given,
which is that of the growing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import TOKENIZER, open_inputs, open_sources, read_chat_template
from weftrain.core.formats.dataset_manifest import DatasetManifest, FimSettings, InputEntry
from weftrain.core.formats.shard_format import Documents
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.readers.corpus import embedded_inputs
from weftrain.data_prep.readers.documents import InputFile, SkippedFile
from weftrain.data_prep.readers.listing import Wanted, find_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages.settings import Conversations, Inputs, Preferences

EMBEDDED = "embedded"  # in place of an address: the running interpreter's own library
READING = ("text_key", "source_key", "weight_key", "tokens_key", "tokens_dtype", "format", "suffix", "source")
Place = tuple[int, int]  # number of an input, and the row in it


@dataclass(frozen=True)
class RecordedDataset:
    """A dataset's folder with its manifest, and what it records of its inputs."""

    folder: Path
    manifest: DatasetManifest

    def entries(self) -> list[InputEntry]:
        """The files that were read, in the order of `doc_file`."""
        with open_inputs(self.folder, self.manifest) as table:
            return list(islice(table, self.manifest.corpus.files))

    def tables(self) -> Iterator[tuple[str, Documents]]:
        """File and documents of each shard."""
        for set_name, entry in self.manifest.sets.items():
            for shard, reader in zip(
                entry.shards, ShardSet(self.folder, self.manifest, set_name).readers(), strict=True
            ):
                yield shard.file, reader.documents()

    def rows(self, files: Sequence[int]) -> dict[Place, tuple[bytes, str]]:
        """Of these files, the documents that are in the dataset: where each lies, its identity, and its shard."""
        found: dict[Place, tuple[bytes, str]] = {}
        for shard, table in self.tables():
            for at in np.flatnonzero(np.isin(table.file, files)).tolist():
                found[int(table.file[at]), int(table.record[at])] = table.id[at].tobytes(), shard
        return found

    def shard_of(self, file: int) -> str:
        """The first shard with a document of an input, in words; nothing where there is none."""
        found = next((shard for shard, table in self.tables() if (table.file == file).any()), None)
        return "" if found is None else f" ({found} has documents of it)"

    def sources(self, num_files: int) -> list[str | None]:
        """The source of all documents of each input; None where they have several, or are none."""
        low, high = np.full(num_files, np.iinfo(np.int64).max), np.full(num_files, -1)
        for _, table in self.tables():
            real = table.file >= 0
            np.minimum.at(low, table.file[real], table.source[real])
            np.maximum.at(high, table.file[real], table.source[real])
        names = [entry.name for entry in open_sources(self.folder, self.manifest)]
        return [names[top] if top == least else None for least, top in zip(low.tolist(), high.tolist(), strict=True)]

    def other_file(self, changed: Sequence[int]) -> str:
        """That these inputs are not what is given, in words, which name the first."""
        names = [entry.name for entry in self.entries()]
        name = names[changed[0]]
        words = f"{name}: is not the file that {self.folder} was made of{and_more(changed)}"
        if (times := names.count(name)) > 1:
            words += f"; {times} of its inputs have this name, and are given in the order that they were added in"
        return words

    def generations(self) -> list[slice]:
        """The files that were read at once: one range, or one for each time that the dataset grew and one before."""
        ends = [0, *(parent.files for parent in self.manifest.parents), self.manifest.corpus.files]
        return [slice(first, stop) for first, stop in pairwise(ends)]


@dataclass(frozen=True)
class GivenInputs:
    """What the reader gives for a dataset, in the order that the dataset records. told_sources: of how many files the
    name of the source is the dataset's word, because nothing given says it.
    """

    inputs: Inputs
    told_sources: int = 0

    def of(self, files: slice) -> Inputs:
        """Those of a generation."""
        return replace(self.inputs, files=tuple(islice(self.inputs.files, files.start, files.stop)))


def given_inputs(
    there: RecordedDataset, addresses: Sequence[str], reading: Mapping[str, str], shards_here: bool
) -> GivenInputs:
    """The files at these addresses, which must be those that the dataset was made of, by name. Raises DataError."""
    if unknown := sorted(set(reading) - set(READING)):
        raise DataError(f"--reading {unknown[0]}: how inputs were read is told by {', '.join(READING)}")
    told = there.manifest.preparation
    options = _options(there.manifest, reading)
    quality = told.get("quality")
    more: dict[str, Any] = {"options": options, "quality": None if quality is None else str(quality)}
    description, licence = there.manifest.corpus.description, there.manifest.corpus.licence
    skipped: Sequence[SkippedFile] = ()
    if tuple(addresses) == (EMBEDDED,):
        found: Sequence[InputFile] = tuple(embedded_inputs()[0])
    else:
        suffixes = (reading["suffix"],) if "suffix" in reading else ()
        wanted = Wanted(tuple(addresses), reading.get("source"), suffixes, reading.get("format"), _record_keys(options))
        listed = find_inputs([wanted], same_names=len(there.manifest.parents) > 0)
        found, skipped = listed.files, listed.skipped
    files = _in_recorded_order(there, found, ", ".join(addresses), shards_here)
    told_sources = 0
    if shards_here and not {"source", "source_key"} & reading.keys() and not _same_sources(there, files):
        sources = there.sources(len(files))
        named = [replace(file, source=of or file.source) for file, of in zip(files, sources, strict=True)]
        told_sources = sum(one.source != file.source for one, file in zip(named, files, strict=True))
        files = named
    return GivenInputs(Inputs(tuple(files), description, licence, skipped=skipped, **more), told_sources)


def _same_sources(there: RecordedDataset, files: Sequence[InputFile]) -> bool:
    return {entry.name for entry in open_sources(there.folder, there.manifest)} == {file.source for file in files}


def _in_recorded_order(
    there: RecordedDataset, given: Sequence[InputFile], where: str, shards_here: bool
) -> list[InputFile]:
    """Raises DataError for a file too few or too many, with a shard that was made of one that is missing."""
    names = [entry.name for entry in there.entries()]
    by_name: dict[str, list[InputFile]] = {}
    for file in given:
        by_name.setdefault(file.name, []).append(file)
    read, found = Counter(names), Counter(file.name for file in given)
    if lacking := sorted((read - found).keys()):
        shard = there.shard_of(names.index(lacking[0])) if shards_here else ""
        raise DataError(
            f"{where}: {lacking[0]} is missing, which {there.folder} was made of{shard}{and_more(lacking)}: names "
            "begin with the folder that was named to `weftrain prep`"
        )
    if added := sorted((found - read).keys()):
        twice = " once more" if added[0] in read else ""
        raise DataError(
            f"{where}: {added[0]} is none of the files that {there.folder} was made of{twice}{and_more(added)}"
        )
    in_turn = {name: iter(files) for name, files in by_name.items()}
    return [next(in_turn[name]) for name in names]


def _options(manifest: DatasetManifest, reading: Mapping[str, str]) -> ReadOptions:
    told = manifest.preparation
    preferences = None if told.get("preferences") is None else True
    return ReadOptions(
        text_key=reading.get("text_key", "text"),
        source_key=reading.get("source_key"),
        weight_key=reading.get("weight_key"),
        tokens_key=reading.get("tokens_key"),
        tokens_dtype=reading.get("tokens_dtype"),
        sequence_length=manifest.sequence_length // (2 if manifest.pairs else 1),
        normalise=_names(told.get("normalise")),
        conversations=None if told.get("chat_template") is None or preferences else True,
        preferences=preferences,
    )


def _record_keys(options: ReadOptions) -> tuple[str, ...]:
    """The fields by which JSON records are known."""
    from weftrain.data_prep.conversations.messages import FIELDS
    from weftrain.data_prep.conversations.preferences import FIELDS as OF_PREFERENCES

    if options.preferences:
        return OF_PREFERENCES
    return FIELDS if options.conversations else (options.text_key,)


def recorded_settings(there: RecordedDataset) -> dict[str, Any]:
    """The recorded settings as arguments of prepare()."""
    manifest = there.manifest
    told: dict[str, Any] = dict(manifest.preparation)
    trained = told["tokenizer"] == "trained"
    rate = told.get("fim_rate")
    fim = None if rate is None else FimSettings(rate=rate, spm_share=told["fim_spm_share"], mode=told["fim_mode"])
    conversations, preferences = _of_records(there.folder, manifest)
    keys = ("eos", "bos", "heldout_fraction", "rows_per_shard", "seed", "order", "epochs", "chunks")
    return {
        **{key: told[key] for key in (*keys, "global_batch_size") if key in told},
        "packing": told["packing"],
        "tokenizer": None if trained else there.folder / TOKENIZER,
        "vocab_size": told["tokenizer_vocab_size"] if trained else None,
        "sequence_length": told["sequence_length"] // (2 if manifest.pairs else 1),
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


def and_more(found: Sequence[Any]) -> str:
    return f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""


def _names(told: Any) -> tuple[str, ...]:
    return tuple(filter(None, str(told or "").split(",")))
