"""The training rows of a whole run, whatever changed in it: each step reads by the recipe of its own segment in the
ledger.

A recipe with `data.continues` gives the rows from there on; the rows before follow from the recipes that the ledger
names. Training and replay need one segment at a time; verbs that ask about any step of a run use this module.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from weftrain.core.config import Recipe
from weftrain.core.data import TokenSource, training_source
from weftrain.core.errors import DataError
from weftrain.core.order.batch import BatchSource
from weftrain.core.order.timeline import ChunkOrder, Timeline
from weftrain.core.run.continuation import continue_data
from weftrain.core.run.lineage import Lineage


@dataclass(frozen=True)
class RecipeSpan:
    """Steps from `first_step` on read by one recipe. open: its rows, once they are asked for."""

    first_step: int
    timeline: Timeline
    open: Callable[[], BatchSource] = field(repr=False)

    @cached_property
    def source(self) -> BatchSource:
        return self.open()


@dataclass(frozen=True)
class RunSource:
    """The spans of a run, in order, from its first step on. Raises DataError for a step or sample before it."""

    spans: tuple[RecipeSpan, ...]
    unknown: tuple[int, str] | None = None  # from which step on, and why, the rows cannot be said yet

    def at(self, step: int) -> BatchSource:
        """The rows of the 0-based step `step`. Raises DataError where their dataset is not there any more."""
        return self._span(step).source

    def sample(self, step: int) -> int:
        """The number in the run of the first sample of `step`."""
        return self._span(step).timeline.sample(step)

    def step_of(self, sample: int) -> tuple[int, int]:
        """The step that reads sample number `sample` of the run, and the row of its batch."""
        place = bisect_right(self.spans, sample, key=lambda span: span.timeline.sample(span.first_step)) - 1
        if place < 0:
            raise DataError(
                f"sample {sample} was read by an earlier recipe, which only the run's ledger holds: put the run's "
                "ledger.jsonl "
                "beside its recipe"
            )
        span = self.spans[place]
        steps, row = divmod(sample - span.timeline.sample(span.first_step), span.timeline.global_batch_size)
        return span.first_step + steps, row

    @property
    def chunks(self) -> ChunkOrder | None:
        """The run's chunks as they were read and will be; None where it has none."""
        source = self.spans[-1].source
        return source.chunks if isinstance(source, TokenSource) else None

    def _span(self, step: int) -> RecipeSpan:
        place = bisect_right(self.spans, step, key=lambda span: span.first_step) - 1
        if self.unknown is not None and step >= self.unknown[0]:
            raise DataError(f"step {step}: the recipe changes at step {self.unknown[0]}: {self.unknown[1]}")
        if place < 0:
            first = self.spans[0].first_step
            raise DataError(
                f"step {step} was read by a recipe from before step {first}, which only the run's ledger holds: put "
                "the run's ledger.jsonl "
                "beside its recipe"
            )
        return self.spans[place]


def run_source(recipe: Recipe, line: Lineage | None) -> RunSource:
    """The rows of a run that stands at `recipe`, with the changes that it plans. line: its ledger's; without one, those
    of the recipe alone.

    The datasets of earlier segments are looked for below the recipe's data.root.
    """
    first = 0 if recipe.data.continues is None else recipe.data.continues.step
    found: list[tuple[int, Recipe]] = []
    for segment in () if line is None else line.segments:
        if segment.first_step >= first:
            break
        read = Recipe.from_record(segment.recipe)
        read = read.model_copy(update={"data": read.data.model_copy(update={"root": recipe.data.root})})
        if not found or _reads(found[-1][1]) != _reads(read):
            found.append((segment.first_step, read))
    known = [*found, (first, recipe)]
    try:
        for change in recipe.changes:
            before = known[-1][1]
            known.append((change.step, continue_data(before.at(change.step), before, change.step, None, None).recipe))
    except DataError as error:
        return RunSource(tuple(_span(*one) for one in known), (change.step, str(error)))
    return RunSource(tuple(_span(*one) for one in known))


def whole_run(source: BatchSource, timeline: Timeline) -> RunSource:
    """One source as that of a whole run."""
    return RunSource((RecipeSpan(timeline.first_step, timeline, lambda: source),))


def _span(first_step: int, recipe: Recipe) -> RecipeSpan:
    return RecipeSpan(first_step, recipe.timeline, lambda: training_source(recipe))


def _reads(recipe: Recipe) -> tuple[object, ...]:
    return recipe.data, recipe.batch.global_batch_size, recipe.schedule.steps if recipe.data.chunks else None
