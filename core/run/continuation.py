"""How a run's data goes on when a resumed run reads otherwise than before, so that no row is read twice or left out
unnoticed.

`continue_data` is called at every resume, before anything is written. Where the mixture, the sources, their subsets,
the skipped rows or the batch size have changed, the recipe gets a `data.continues`: the step and sample at which the
new data section begins, and how far each source had been read. From then on the rows are a pure function of that recipe
again (core/data.py). What cannot go on exactly, such as a source whose dataset was prepared anew, is counted and
reported.

A source goes on where its dataset, its name, the seed and the kind of order are the same. A pass over its rows that is
under way is finished first: over the subset that it began with, as far as the new one holds it, then over what the new
subset adds. A dataset that grew from the one that was read is the same one with more rows at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weftrain.core.config import Recipe
from weftrain.core.data import TokenSource, training_source
from weftrain.core.errors import CheckpointError, DataError
from weftrain.core.formats.strict_model import first_problem
from weftrain.core.order.batch import BatchSource
from weftrain.core.order.data_section import Continuation, DataConfig, SourceConfig
from weftrain.core.order.source_order import OrderedSource, skipped_rows
from weftrain.core.order.timeline import Timeline
from weftrain.core.run.lineage import TrainingSegment, going_back
from weftrain.core.run.source_cursors import continued_sources, cursors_of


@dataclass(frozen=True)
class Continued:
    """The recipe asked for, with data.continues where it needs one; its rows; lines for the user about the change."""

    recipe: Recipe
    source: BatchSource
    notes: tuple[str, ...] = ()

    def position(self, step: int) -> int:
        """Number of the first sample of `step`."""
        return self.recipe.timeline.sample(step)


def continue_data(
    asked: Recipe, before: Recipe, step: int, dataset_id: str | None, cursors: Mapping[str, Any] | None
) -> Continued:
    """How a run that completed `step` steps by the recipe `before` reads on by the recipe `asked`.

    dataset_id: of what it read; None: not known. cursors: how far each source had been read, as a checkpoint's manifest
    records it; None: it is computed from the datasets. Raises DataError for what cannot go on, with a remedy.
    """
    asked = _with(asked, None)
    times = before.timeline
    _check_chunks(asked, before, times, step)
    fresh = training_source(asked)
    if _stream(asked) == _stream(before) and dataset_id in (None, fresh.dataset_id):
        return _same_stream(asked, before, times, step, fresh)
    _check_deferred(asked, before, times, step)
    found = cursors_of(asked, before, step, dataset_id, cursors)
    if found is not None and before.data.continues is not None:
        found = {**before.data.continues.sources, **found}  # also of a source that was left out and may come back
    sources, notes = continued_sources(asked, before, fresh, found)
    chunk = within = 0
    if times.chunks is not None and asked.data.chunks is not None:
        chunk, inside = times.front(step)
        within = step % (asked.schedule.steps // asked.data.chunks) * asked.batch.global_batch_size if inside else 0
    sample = times.sample(step)
    begun = Continuation(
        step=step,
        sample=sample,
        chunks=times.read_chunks(step),
        base_sample=sample,
        base_chunk=chunk,
        base_within=within,
        sources={**(found or {}), **sources},
    )
    recipe = _with(asked, begun)
    return Continued(
        recipe,
        training_source(recipe),
        (f"from step {step}, sample {sample:,}, the data is read as the changed recipe says", *notes),
    )


def continue_from(asked: Recipe, other: Mapping[str, Any]) -> Continued:
    """How the data of a run begins that starts from another run's checkpoint. other: that checkpoint's manifest."""
    assert asked.start_from is not None
    run = asked.start_from.source
    goes_on = asked.start_from.data == "continue"
    asked = _with(asked, None)
    fresh = training_source(asked)
    before = Recipe.from_record(other["recipe"])
    found = cursors_of(asked, before, other["step"], other["dataset_id"], other.get("sources") or None) or {}
    known = {cursor.dataset_id: cursor for cursor in found.values()}
    components = fresh.sources if isinstance(fresh, TokenSource) else ()
    shared = {
        component.name: known[one]
        for component in components
        for one in (*(parent.train.id for parent in component.shards.manifest.parents), component.shards.entry.id)
        if one in known
    }
    if not goes_on:
        notes = (
            f"start_from: source '{name}' begins at its first row, and {run} read {cursor.read:,} samples of the "
            "same dataset: "
            "start_from.data=continue begins after those"
            for name, cursor in shared.items()
        )
        return Continued(asked, fresh, tuple(notes))
    if not shared:
        raise DataError(
            f"start_from.data: no source reads a dataset that {run} has read: set start_from.data to from_start"
        )
    sources, notes_on = continued_sources(asked, before, fresh, found)
    recipe = _with(asked, Continuation(step=0, sample=0, sources=sources))
    return Continued(
        recipe,
        training_source(recipe),
        (f"start_from: the data goes on after step {other['step']} of {run}", *notes_on),
    )


def data_of_start(
    folder: Path,
    asked: Recipe,
    source: BatchSource,
    step: int,
    manifest: Mapping[str, Any] | None,
    foreign: Mapping[str, Any] | None,
    made: TrainingSegment | None,
) -> Continued:
    """The recipe and the rows with which the run in `folder` goes on after `step` completed steps, or begins.

    source: of the recipe asked for. manifest: of the checkpoint that it resumes from; foreign: of another run's, by
    start_from. made: the segment that made the state which the backend itself keeps, where the run goes on from that.
    Raises DataError for data that cannot go on, CheckpointError for a record that cannot be read.
    """
    if manifest is not None and manifest["step"] == step:
        check_recorded_order(manifest)
        return continue_data(
            asked, recipe_of(manifest["recipe"], folder), step, manifest["dataset_id"], manifest.get("sources") or None
        )
    if made is not None:  # the backend's own state stands beyond the newest checkpoint
        return continue_data(asked, recipe_of(made.recipe, folder), step, made.dataset_id, None)
    if foreign is not None and asked.start_from is not None and asked.start_from.steps == "continue":
        check_recorded_order(foreign)
        return continue_data(
            asked, recipe_of(foreign["recipe"], folder), step, foreign["dataset_id"], foreign.get("sources") or None
        )
    if foreign is not None and asked.start_from is not None and asked.start_from.offset:
        return _offset(asked, source, asked.start_from.offset)
    if foreign is not None and asked.start_from is not None and asked.start_from.huggingface is None:
        return continue_from(asked, foreign)
    check_beginning(asked)
    return Continued(asked, source)


def _offset(asked: Recipe, source: BatchSource, offset: int) -> Continued:
    """The data from its sample `offset` on. Raises DataError."""
    check_beginning(asked)
    if not isinstance(source, TokenSource) or offset % asked.data.pieces:
        what = "synthetic rows" if not isinstance(source, TokenSource) else f"rows of {asked.data.pieces} samples each"
        raise DataError(f"start_from.offset: {offset} samples cannot be passed over of {what}: set another")
    cursors = source.cursors_after(offset)
    recipe = _with(asked, Continuation(step=0, sample=0, sources=cursors))
    notes = [f"start_from: the first {offset:,} samples of the data are passed over"]
    return Continued(recipe, training_source(recipe), tuple(notes))


def recipe_of(recipe: Mapping[str, Any], folder: Path) -> Recipe:
    """A recipe recorded by the run in `folder`. Raises CheckpointError if this version cannot read it."""
    try:
        return Recipe.from_record(recipe)
    except ValidationError as error:
        raise CheckpointError(
            f"{folder}: the recipe that the run was made with is not one that this version reads, so its data cannot "
            "go on "
            f"({first_problem(error)}): continue it with the version that made it"
        ) from error


def check_beginning(recipe: Recipe) -> None:
    """Refuse a recipe for a run's beginning that was written for its middle. Raises DataError."""
    if recipe.data.continues is not None:
        raise DataError(
            f"data.continues: this recipe goes on at step {recipe.data.continues.step} of the run that it was recorded "
            "for, and here is no "
            "checkpoint of it: add data.continues=null to begin at the datasets' first rows"
        )


def check_recorded_order(manifest: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that skipped rows in an earlier version's order. Raises DataError."""
    if manifest.get("sources") is None and any(
        entry.get("rows") for entry in manifest["recipe"]["data"].get("skip", ())
    ):
        raise DataError(
            f"step {manifest['step']}: data.skip names rows, and the checkpoint was made by a version that read the "
            "others in another order: finish the run with that version, or start a new run from this checkpoint with "
            "start_from"
        )


def check_amounts(recipe: Recipe, source: BatchSource) -> Iterator[str]:
    """Compare what the run will read with what exists, in lines for the user. Raises DataError if it reads too much:
    also where a later change of the batch makes it so. What is said of each source is up to the next change.
    """
    if not isinstance(source, TokenSource):
        return
    data, pieces = recipe.data, recipe.data.pieces
    steps = recipe.changes[0].step if recipe.changes else recipe.schedule.steps
    size = source.global_batch_size // pieces
    samples, counts = source.timeline.sample(steps) // pieces, source.counts(steps)
    stated = [
        _stated_samples(data, given, component) for given, component in zip(data.sources, source.sources, strict=True)
    ]
    total = sum(count for count in stated if count is not None)
    if None not in stated and data.continues is None and (too_much := _beyond(recipe, total)):
        last_step, steps, samples, of_each = too_much
        kind = data.sources[0].share_kind
        most = max(source.sources, key=lambda component: counts[component.name] / component.num_rows)
        count, rows = counts[most.name], most.num_rows
        passes = f" ('{most.name}': {count:,} of its {rows:,} rows, {count / rows:.3g} passes)"
        raise DataError(
            f"data.sources: {kind} of all sources come to {total:,} samples, and {steps:,} steps of {of_each} read "
            f"{samples:,}{'' if recipe.changes else passes}: "
            f"set schedule.steps to at most {last_step}, state more {kind}, or give weight instead"
        )
    for component in source.sources:
        name, rows, count = component.name, component.num_rows, counts[component.name]
        if rows < (each := count / samples * size):
            yield (
                f"warning: source '{name}' has {rows:,} rows, and a batch takes {each:,.0f} samples of it: a row comes "
                "more than once in a batch"
            )
        elif count > rows:
            until = f" until step {steps}, where the recipe changes," if recipe.changes else ""
            yield f"source '{name}': {count:,} samples{until} are {count / rows:.1f} passes over its {rows:,} rows"


def _beyond(recipe: Recipe, total: int) -> tuple[int, int, int, str] | None:
    """Whether the run, with its planned changes, reads a batch or more beyond `total` rows: the last step that it may
    have, its steps, the rows that they read, and the rows of a step in words. Up to a change of the sources, which
    states anew how much there is.
    """
    read, last_step, sizes, steps = 0, None, list[int](), 0
    for first, stop, stage in recipe.stages():
        if stage.data.sources != recipe.data.sources:
            break
        size = stage.batch.global_batch_size // stage.data.pieces
        after = read + (stop - first) * size
        if last_step is None and after - total >= size:
            last_step = first + -(-(total - read) // size)
        read, steps, sizes = after, stop, [*sizes, size]
    if last_step is None:
        return None
    least, most = min(sizes), max(sizes)
    return last_step, steps, read, f"{least}" if least == most else f"{least} to {most}"


def _stated_samples(data: DataConfig, source: SourceConfig, component: OrderedSource) -> int | None:
    if source.tokens is not None:
        return -(-source.tokens // (data.row_length or data.sequence_length))
    if source.epochs is not None:
        return round(source.epochs * (component.num_rows // component.order.num_epochs))
    return None


def _with(recipe: Recipe, continues: Continuation | None) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"continues": continues})})


def _stream(recipe: Recipe) -> tuple[Any, ...]:
    """All of a recipe that decides which row a number of the stream is, beside the datasets."""
    data = recipe.data
    sources = [
        (one.name, one.weight, one.tokens, one.epochs, one.subset, skipped_rows(data, one.name)) for one in data.sources
    ]
    chunk = None if data.chunks is None else recipe.batch.global_batch_size
    return data.shuffle_seed, data.order, data.synthetic_rows, data.pieces, sources, chunk


def _same_stream(asked: Recipe, before: Recipe, times: Timeline, step: int, fresh: BatchSource) -> Continued:
    """The stream goes on as it is; the batch size and the order of chunks may be others from here on."""
    carried = before.data.continues
    recipe = _with(asked, carried)
    now = recipe.timeline
    if now.sample(step) != times.sample(step) or now.read_chunks(step) != times.read_chunks(step):
        base = Continuation(step=step, sample=times.sample(step)) if carried is None else carried
        update = {"step": step, "sample": times.sample(step), "chunks": times.read_chunks(step)}
        recipe = _with(asked, base.model_copy(update=update))
    return Continued(recipe, fresh if recipe.data.continues is None else training_source(recipe))


def _check_chunks(asked: Recipe, before: Recipe, times: Timeline, step: int) -> None:
    """A run keeps the length of its chunks, and a chunk that was read stays read."""
    was, now = (None if one.data.chunks is None else one.schedule.steps // one.data.chunks for one in (before, asked))
    if step == 0 or was == now is None:
        return
    if was is None or now is None:
        raise DataError(
            f"data.chunks: a run is cut in chunks when it begins: set data.chunks={before.data.chunks or 'null'}"
        )
    if was != now:
        count = max(1, round(asked.schedule.steps / was))
        raise DataError(
            f"data.chunks: {asked.schedule.steps} steps in {asked.data.chunks} chunks are {now} steps a chunk, and "
            "this run's chunks have "
            f"{was}: set schedule.steps={count * was} data.chunks={count}"
        )
    read, earlier = times.read_chunks(step), _actions(before)
    for chunk, action in _actions(asked).items():
        if chunk in read and chunk not in earlier:
            first = read.index(chunk) * was
            raise DataError(
                f"data.skip: chunk {chunk} cannot be {'deferred' if action == 'defer' else 'dropped'}: it was begun at "
                f"step {first}; "
                f"{going_back(first)}"
            )
    base = 0 if before.data.continues is None else before.data.continues.base_chunk
    for chunk in earlier:
        if chunk < base and chunk not in read and _actions(asked).get(chunk) != "drop":
            raise DataError(
                f"data.skip: chunk {chunk} was dropped before the data changed, and cannot be read any more: leave its "
                "entry in data.skip"
            )


def _check_deferred(asked: Recipe, before: Recipe, times: Timeline, step: int) -> None:
    """A deferred chunk is a range of the stream as it was: it must be read before the stream changes."""
    if times.chunks is None:
        return
    read, actions = times.read_chunks(step), _actions(asked)
    front, _ = times.front(step)
    base = 0 if before.data.continues is None else before.data.continues.base_chunk
    waiting = [chunk for chunk in range(base, front) if chunk not in read and actions.get(chunk) != "drop"]
    begun = (times.sample(step) - times.chunks.first_sample) % times.chunks.samples
    if begun and read[-1] < max(read):
        waiting.append(read[-1])
    if waiting:
        names = ", ".join(map(str, waiting))
        raise DataError(
            f"data.chunks: chunk {names} was deferred and is not read yet, and its samples are those of the data "
            "before this change: "
            f"change mixture, rows or batch size after it has been read, or drop it with data.skip and `action: drop`"
        )


def _actions(recipe: Recipe) -> dict[int, str]:
    return {entry.chunk: str(entry.action) for entry in recipe.data.skip if entry.chunk is not None}
