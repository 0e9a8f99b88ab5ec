"""The sets of a recipe's sources, opened and held against the recipe; the held-out ones are what evaluation reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.dataset_manifest import DatasetManifest, SetName
from weftrain.core.formats.reference_file import Reference, read_reference
from weftrain.core.formats.shard_reader import read_document_starts, read_rows
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.order.batch import Batch
from weftrain.core.order.data_section import DataConfig, SourceConfig


@dataclass(frozen=True)
class HeldOut:
    """Implements EvaluationSource: the first num_rows rows of a source's held-out set, in the order they lie."""

    name: str
    shards: ShardSet
    num_rows: int
    document_attention: bool = False
    reference: Reference | None = None  # of pairs: their log-probabilities
    pieces: int = 1  # a row of the set is cut into so many, and they are what is read: `num_rows` counts them

    @property
    def sequence_length(self) -> int:
        return self.shards.manifest.sequence_length // self.pieces

    @property
    def rows_available(self) -> int:
        return self.shards.num_rows * self.pieces

    @property
    def dataset_id(self) -> str:
        return self.shards.entry.id

    def rows(self, first: int, count: int) -> Batch:
        """Rows first..first+count-1. Raises DataError for a damaged shard, ValueError outside the set."""
        if first < 0 or count < 0 or first + count > self.num_rows:
            raise ValueError(f"held-out set {self.name}: rows {first}..{first + count - 1} of {self.num_rows}")
        numbers, piece = np.divmod(np.arange(first, first + count, dtype=np.int64), self.pieces)
        readers, positions = self.shards.positions(numbers)
        places = (np.array(positions, dtype=np.int64) + piece * self.sequence_length).tolist()
        ids = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        planes, starts = read_rows(ids, readers, places), None
        if self.document_attention:
            starts = read_document_starts(self.sequence_length, readers, places)
        found = None if self.reference is None else self.reference.values["heldout"][numbers, piece]
        return Batch(ids, document_start=starts, reference=found, **planes)


def open_heldout(
    data: DataConfig, vocab_size: int, rows: int, root: Path | None = None, reference: str | None = None
) -> list[HeldOut]:
    """The held-out set of each source that has one, cut to `rows` rows. reference: see open_training.
    Raises DataError.
    """
    opened = [(source.name, open_set(data, source, "heldout", root, vocab_size)) for source in data.sources]
    return [
        HeldOut(
            name,
            shards,
            min(rows, shards.num_rows) * data.pieces,
            data.document_attention,
            None if reference is None else read_reference(shards.folder, reference, shards.manifest),
            data.pieces,
        )
        for name, shards in opened
        if shards is not None
    ]


def open_set(
    data: DataConfig, source: SourceConfig, set_name: SetName, root: Path | None, vocab_size: int
) -> ShardSet | None:
    """A source's set, fit for the recipe; None where it has no such set."""
    parent = Path(data.root) if root is None else root
    folder = parent / source.path
    if not folder.is_dir():
        options = f"--name {source.path} --sequence-length {data.sequence_length} --output {parent}"
        raise DataError(
            f"{folder}: no dataset for source '{source.name}'; make it with `weftrain prep INPUTS {options}` (no "
            "INPUTS: embedded corpus)"
        )
    manifest = read_dataset_manifest(folder)
    _check_pairs(folder, manifest, data)
    row_length = data.row_length or data.sequence_length
    if manifest.sequence_length != row_length:
        key = "data.sequence_length" if data.row_length is None else "data.row_length"
        cut = data.row_length is None and manifest.sequence_length % data.sequence_length == 0
        by_cutting = f", cut its rows with data.row_length={manifest.sequence_length}" if cut else ""
        raise DataError(
            f"{folder}: prepared with sequence_length {manifest.sequence_length}, the recipe says {row_length}: "
            f"set {key}={manifest.sequence_length}{by_cutting}, or prepare the dataset again"
        )
    if data.pieces > 1 and manifest.packing == "rows" and not manifest.pairs:
        raise DataError(
            f"{folder}: each of its rows is an example of its own, which data.row_length would cut in pieces that do "
            "not know of each other: leave data.row_length out"
        )
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"{folder}: prepared with a vocabulary of {manifest.vocab_size}, the model has {vocab_size}: "
            f"set model.vocab_size to at least {manifest.vocab_size}, or use the model's tokenizer"
        )
    recorded = None if manifest.fim is None else manifest.fim.settings
    if recorded != source.fim:
        said = (None if fim is None else fim.model_dump() for fim in (recorded, source.fim))
        raise DataError(
            f"{folder}: prepared with fim {next(said)}, the recipe's source '{source.name}' says {next(said)}: make "
            "them equal"
        )
    return ShardSet(folder, manifest, set_name) if set_name in manifest.sets else None


def _check_pairs(folder: Path, manifest: DatasetManifest, data: DataConfig) -> None:
    """Raises DataError where rows that are pairs would not be read in two pieces, the sides of a pair."""
    length = manifest.sequence_length
    if manifest.pairs and (data.row_length, 2 * data.sequence_length) != (length, length):
        raise DataError(
            f"{folder}: holds preference pairs, each a row of two sides of {length // 2} tokens: set "
            f"data.sequence_length={length // 2} data.row_length={length}"
        )
