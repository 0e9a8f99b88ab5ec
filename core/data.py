"""What is read when: the mixture of sources, the order within each, and position, which is one integer.

The timeline (core/order/timeline.py) says which sample of the run a row of a step is, and where that stands in the
stream when chunks are deferred; the mixture (core/order/mixture.py) of which source it is, and its index k within that
source; the source's order (core/order/row_order.py) which row that is. All of it is a pure function of (datasets,
recipe, step, row): nothing is stored, and any number of readers share the work. Where a run went on with other data,
`data.continues` says how far each source had been read (core/run/continuation.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from weftrain.core.config import Recipe
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset_manifest import SourceCursor
from weftrain.core.formats.reference_file import Reference, read_reference, training_id
from weftrain.core.formats.shard_format import LOSS_MASK, TOKEN_WEIGHTS
from weftrain.core.formats.shard_reader import ShardReader, read_document_starts, read_rows
from weftrain.core.formats.strict_model import first_problem
from weftrain.core.model_config import ModelConfig
from weftrain.core.model_differences import model_differences
from weftrain.core.objectives_section import NextTokenObjective
from weftrain.core.order.batch import Batch, BatchSource
from weftrain.core.order.data_section import DataConfig
from weftrain.core.order.mixture import CerebrasOrder, SampleOrder, make_mixture, source_shares
from weftrain.core.order.row_plan import RowPlan, ShardReaders, block_parts, block_size, make_plan
from weftrain.core.order.row_selection import Range
from weftrain.core.order.source_order import OrderedSource, ordered_source
from weftrain.core.order.source_sets import open_set
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.order.timeline import ChunkOrder, Timeline, timeline
from weftrain.core.unlearning_section import UnlearningObjective


@dataclass(frozen=True)
class Located:
    """Where a training sample comes from. file: the shard, in `folder`. row_in_shard, row_in_set, epoch: from 0.
    chunk: of the dataset, run_chunk: of the run; None if there are none. first_token: of the row, where it is cut.
    """

    source: str
    folder: Path
    file: str
    row_in_shard: int
    row_in_set: int
    epoch: int
    chunk: int | None
    run_chunk: int | None
    first_token: int = 0


@dataclass(frozen=True)
class TokenSource:
    """Implements BatchSource. Picklable and stateless. dataset_id: the one source's, or the Merkle root of all, with
    the references that pairs are held against.
    """

    sequence_length: int
    dataset_id: str
    sources: tuple[OrderedSource, ...]
    mixture: SampleOrder
    timeline: Timeline
    document_attention: bool = False
    forget: tuple[bool, ...] | None = None  # of each source, for objectives of unlearning
    token_weights: bool = False  # read those that the shards hold; a shard without any weighs each token as 1

    @property
    def global_batch_size(self) -> int:
        return self.timeline.global_batch_size

    @property
    def chunks(self) -> ChunkOrder | None:
        return self.timeline.chunks

    def rows(self, step: int, first: int, count: int) -> Batch:
        """Rows first..first+count-1 of the batch of `step`. Raises DataError for a damaged shard, ValueError."""
        readers, positions = self.places(step, first, count)
        ids = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        planes, starts = read_rows(ids, readers, positions, self._planes), None
        if self.token_weights and TOKEN_WEIGHTS not in planes:
            planes[TOKEN_WEIGHTS] = np.ones((count, self.sequence_length), np.float32)
        if self.document_attention:
            starts = read_document_starts(self.sequence_length, readers, positions)
        forget = None if self.forget is None else np.array(self.forget)[self._locate(step, first, count)[0]]
        reference = self._references(step, first, count)
        return Batch(ids, document_start=starts, reference=reference, forget=forget, **planes)

    def _references(self, step: int, first: int, count: int) -> np.ndarray | None:
        """float64 [rows]: log-probabilities of these rows under the frozen reference, if the sources have one."""
        if self.sources[0].reference is None:
            return None
        found = np.empty(count, np.float64)
        of_source, numbers, pieces = self._locate(step, first, count)
        for index, source in enumerate(self.sources):
            chosen = np.flatnonzero(of_source == index)
            assert source.reference is not None
            rows = source.row_numbers(numbers[chosen])
            found[chosen] = source.reference.values["train"][rows, pieces[chosen]]
        return found

    def places(self, step: int, first: int, count: int) -> tuple[list[ShardReader], list[int]]:
        """The shard that each of these rows is read from, and the token there at which it begins."""
        low, high = self._samples(step, first, count)
        shards: list[int] = []
        positions: list[int] = []
        pieces = self.timeline.pieces
        for start, stop in self.timeline.spans(low, high):
            before = len(shards)
            for block, part in block_parts((start // pieces, -(-stop // pieces)), self._block_size):
                plan = self._plan(block)
                shards += plan.shards[part]
                positions += plan.positions[part]
            if pieces > 1:
                cut = slice(start % pieces, start % pieces + stop - start)
                shards[before:] = np.repeat(shards[before:], pieces)[cut].tolist()
                at = np.add.outer(positions[before:], np.arange(pieces) * self.sequence_length)
                positions[before:] = at.reshape(-1)[cut].tolist()
        return [self._readers[number] for number in shards], positions

    def sample_names(self, step: int, first: int, count: int) -> list[str]:
        """'source/train/00003.h5:17' for each row; where rows are cut, with '+512' for a piece from token 512 on."""
        names = []
        for index, number, piece in zip(*(found.tolist() for found in self._locate(step, first, count)), strict=True):
            source = self.sources[index]
            file, row = source.shards.locate(int(source.row_numbers(np.array([number]))[0]))
            cut = "" if self.timeline.pieces == 1 else f"+{piece * self.sequence_length}"
            names.append(f"{source.name}/{file}:{row}{cut}")
        return names

    def locate(self, step: int, row: int) -> Located:
        """Where row `row` of the batch of `step` comes from. Raises ValueError outside the batch."""
        index, k, piece = (int(array[0]) for array in self._locate(step, row, 1))
        source = self.sources[index]
        number = int(source.row_numbers(np.array([k]))[0])
        file, row_in_shard = source.shards.locate(number)
        folder, epoch, chunk = source.shards.folder, source.order.epoch(k), source.order.chunk(k)
        first = piece * self.sequence_length
        return Located(source.name, folder, file, row_in_shard, number, epoch, chunk, self.chunk_of(step), first)

    def chunk_of(self, step: int) -> int | None:
        """Which of the run's chunks the batch of `step` is of; None where the run has none."""
        return self.timeline.chunk_at(step)

    def counts(self, step: int) -> dict[str, int]:
        """Rows of each source in the first `step` steps."""
        counts = self.timeline.counts(self.mixture, step)
        before = (0 if source.cursor is None else source.cursor.read for source in self.sources)
        return {source.name: read + count for source, read, count in zip(self.sources, before, counts, strict=True)}

    def cursors(self, step: int) -> dict[str, SourceCursor]:
        """How far each source has been read after `step` steps; deferred chunks still to come count as read."""
        next_k = self.mixture.next_k(self.timeline.next_row(step))
        reads = self.counts(step)
        return {
            source.name: source.cursor_at(k).model_copy(update={"read": reads[source.name]})
            for source, k in zip(self.sources, next_k, strict=True)
        }

    def cursors_after(self, samples: int) -> dict[str, SourceCursor]:
        """How far each source has been read after the first `samples` of the stream, which end with a whole row."""
        rows = samples // self.timeline.pieces
        return {
            source.name: source.cursor_at(k).model_copy(update={"read": 0})
            for source, k in zip(self.sources, self.mixture.next_k(rows), strict=True)
        }

    def _locate(self, step: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each sample: the index of its source, the index of its row within that, and which piece of the row."""
        numbers = self.timeline.numbers(np.arange(*self._samples(step, first, count), dtype=np.int64))
        rows, pieces = np.divmod(numbers, self.timeline.pieces)
        return *self.mixture.locate(rows), pieces

    def _samples(self, step: int, first: int, count: int) -> Range:
        """The numbers in the run of rows first..first+count-1, [first, stop). Raises ValueError outside the batch."""
        if step < 0 or first < 0 or count < 0 or first + count > self.global_batch_size:
            raise ValueError(f"step {step}: rows {first}..{first + count - 1} of a batch of {self.global_batch_size}")
        start = self.timeline.sample(step) + first
        return start, start + count

    @property
    def _planes(self) -> tuple[str, ...]:
        return (LOSS_MASK, TOKEN_WEIGHTS) if self.token_weights else (LOSS_MASK,)

    @cached_property
    def _block_size(self) -> int:
        return block_size(self.sources)

    @cached_property
    def _plan(self) -> Callable[[int], RowPlan]:
        """The plan of a block of samples, by its number; the latest are kept."""
        return lru_cache(maxsize=8)(partial(make_plan, self.sources, self.mixture, self._block_size))

    @cached_property
    def _readers(self) -> ShardReaders:
        return ShardReaders([source.shards for source in self.sources])

    def __getstate__(self) -> dict[str, Any]:
        # without plans and readers, which a process makes for itself
        return {field.name: getattr(self, field.name) for field in fields(self)}


def open_training(
    data: DataConfig,
    global_batch_size: int,
    root: Path | None = None,
    *,
    vocab_size: int,
    steps: int | None = None,
    reference: str | None = None,
) -> TokenSource:
    """The training rows of a recipe that names `sources`, everything checked that can be before step 0.

    root: instead of data.root. vocab_size: the model's, which may exceed the datasets'. steps: of the run, needed where
    it has chunks. reference: the name of the log-probabilities of pairs, of objective dpo. Raises DataError.
    """
    opened = [open_set(data, source, "train", root, vocab_size) for source in data.sources]
    sources = [
        ordered_source(data, given, shards)
        for given, shards in zip(data.sources, opened, strict=True)
        if shards is not None
    ]
    if reference is not None:
        sources = [replace(source, reference=_reference(source, reference)) for source in sources]
    ids = [source.shards.entry.id for source in sources]
    roots = [source.reference.root for source in sources if source.reference is not None]
    rows = [source.order.num_rows // source.order.num_epochs for source in sources]
    mixture: SampleOrder = make_mixture(data.sources, data.shuffle_seed, rows)
    if data.order == "cerebras":
        weights = tuple(float(share) for share in source_shares(data.sources, rows))
        mixture = CerebrasOrder(weights, tuple(source.order.num_rows for source in sources), data.shuffle_seed)
    return TokenSource(
        data.sequence_length,
        training_id(ids, roots),
        tuple(sources),
        mixture,
        timeline(data, steps, global_batch_size),
        data.document_attention,
    )


def training_source(recipe: Recipe) -> BatchSource:
    """The training rows of a recipe, prepared or synthetic, wherever it is read. Raises DataError."""
    data, batch_size = recipe.data, recipe.batch.global_batch_size
    weighs = "token_weights" in recipe.objective.features
    if data.synthetic_rows is not None:
        if weighs:
            raise DataError(
                "objective.token_weights is true, and made-up rows (data.synthetic_rows) have no weights: leave the "
                "key out, or name a dataset with weights in data.sources"
            )
        start = (0, 0) if data.continues is None else (data.continues.step, data.continues.sample)
        rows = synthetic_source(
            recipe.model.vocab_size,
            data.sequence_length,
            data.synthetic_rows,
            batch_size,
            data.shuffle_seed,
            *start,
            pairs=recipe.objective.name == "dpo",
        )
        return replace(rows, forget=True) if isinstance(recipe.objective, UnlearningObjective) else rows
    steps, vocab_size = recipe.schedule.steps, recipe.model.vocab_size
    source = open_training(data, batch_size, vocab_size=vocab_size, steps=steps, reference=recipe.objective.reference)
    _check_objective(recipe, source)
    _check_weights(recipe, source)
    source = replace(source, token_weights=weighs)
    if isinstance(recipe.objective, UnlearningObjective):
        source = replace(source, forget=tuple(one.name in recipe.objective.forget for one in source.sources))
    return source


def _reference(source: OrderedSource, name: str) -> Reference:
    shards = source.shards
    if not shards.manifest.pairs:
        raise DataError(
            f"{shards.folder}: holds no preference pairs, and objective dpo reads nothing else: prepare it with "
            "`weftrain prep --preferences pairs`, or set objective.name=next_token"
        )
    return read_reference(shards.folder, name, shards.manifest)


def _check_objective(recipe: Recipe, source: TokenSource) -> None:
    """Raises DataError where the data are not what the objective is of, or the reference is another model."""
    for one in source.sources:
        if one.reference is None and one.shards.manifest.pairs:
            raise DataError(
                f"{one.shards.folder}: holds preference pairs, and the objective is {recipe.objective.name}: set "
                "objective.name=dpo, or prepare it with `weftrain prep --preferences chosen`"
            )
        if one.reference is None or recipe.start_from is None:
            continue
        path = one.reference.path
        try:
            model = ModelConfig.model_validate(one.reference.manifest.model)
        except ValidationError as error:
            raise DataError(f"{path}: model: {first_problem(error)}: compute the reference again") from error
        if different := model_differences(model, recipe.model):
            raise DataError(
                f"{path}: is of another architecture than the weights that the run starts from: "
                f"{'; '.join(different.values())}: compute it with `weftrain data reference {one.shards.folder} --of` "
                "that start"
            )


def _check_weights(recipe: Recipe, source: TokenSource) -> None:
    """Raises DataError where the recipe asks for weights of tokens that no source has, or does not say whether those
    that there are count.
    """
    objective, folders = recipe.objective, [one.shards.folder for one in source.sources]
    weighted = [one.shards.folder for one in source.sources if one.shards.manifest.weighted]
    if not isinstance(objective, NextTokenObjective):
        if weighted:
            raise DataError(
                f"{weighted[0]}: holds weights of tokens, which objective {objective.name} does not use: prepare it "
                "without them"
            )
    elif objective.token_weights and not weighted:
        raise DataError(
            f"{', '.join(map(str, folders))}: objective.token_weights is true, and no source has weights of tokens: "
            "leave the key out, or prepare the dataset with weights (`weftrain prep --weight-key`, or the key 'weight' "
            "of a conversation's messages)"
        )
    elif weighted and objective.token_weights is None:
        raise DataError(
            f"{weighted[0]}: holds weights of tokens, and the recipe does not say whether they count: set "
            "objective.token_weights=true, or =false to train on its tokens as if each weighed 1"
        )
