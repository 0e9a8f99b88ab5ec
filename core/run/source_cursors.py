"""Where each source of a run's data goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weftrain.core.config import Recipe
from weftrain.core.data import TokenSource, training_source
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset_manifest import SourceCursor
from weftrain.core.order.batch import BatchSource
from weftrain.core.order.data_section import DataConfig, SourceConfig
from weftrain.core.order.row_order import RowOrder
from weftrain.core.order.row_selection import without
from weftrain.core.order.source_order import OrderedSource, pass_order


def cursors_of(
    asked: Recipe, before: Recipe, step: int, dataset_id: str | None, recorded: Mapping[str, Any] | None = None
) -> dict[str, SourceCursor] | None:
    """How far each source had been read; None where neither the record nor the datasets tell."""
    if recorded is not None:
        return {name: SourceCursor.model_validate(cursor) for name, cursor in recorded.items()}
    for root in dict.fromkeys((asked.data.root, before.data.root)):
        try:
            source = training_source(before.model_copy(update={"data": before.data.model_copy(update={"root": root})}))
        except DataError:
            continue
        if dataset_id in (None, source.dataset_id):
            return source.cursors(step) if isinstance(source, TokenSource) else {}
    return None


def continued_sources(
    asked: Recipe, before: Recipe, fresh: BatchSource, found: Mapping[str, SourceCursor] | None
) -> tuple[dict[str, SourceCursor], list[str]]:
    """Where each source of `asked` goes on, and what is to be said of it."""
    if not isinstance(fresh, TokenSource):
        return {}, []
    if found is None:
        return {}, [
            "warning: the datasets read before are missing and the record does not say how far they were read: every "
            "source "
            "begins at its first row"
        ]
    sources: dict[str, SourceCursor] = {}
    notes: list[str] = []
    old_sources = {source.name: source for source in before.data.sources}
    same_order = (asked.data.shuffle_seed, asked.data.order) == (before.data.shuffle_seed, before.data.order)
    for given, component in zip(asked.data.sources, fresh.sources, strict=True):
        name, old = given.name, found.get(given.name)
        size = None if old is None else component.shards.manifest.rows_of_ancestor(old.dataset_id)
        if old is not None and size is not None and same_order:
            old = _of_grown(old, component.shards.entry.id, size)
            added = component.shards.num_rows - size
            notes.append(
                f"source '{name}' has grown by {added:,} rows"
                + (": they come at the end of the pass under way" if old.place else "")
            )
        if old is not None and old.dataset_id == component.shards.entry.id and same_order:
            goes_on = old.subsets[-1] == given.subset and len(old.rows) < len(old.subsets)
            subsets = old.subsets if goes_on else (*old.subsets, given.subset)
            update = {"subsets": subsets} if old.place else {"subsets": (given.subset,), "rows": ()}
            sources[name] = old.model_copy(update=update)
            notes += _told_of_rows(asked.data, before.data, given, old_sources.get(name, given), component, old, size)
            continue
        start = SourceCursor(
            dataset_id=component.shards.entry.id,
            read=0 if old is None else old.read,
            turn=0,
            place=0,
            subsets=(given.subset,),
        )
        sources[name] = start
        same = [one for one in found if found[one].dataset_id == start.dataset_id and one in old_sources]
        known = (
            name
            if name in same
            else next((one for one in same if one not in {source.name for source in asked.data.sources}), None)
        )
        if known is not None:
            again = _come_again(asked.data, before.data, given, old_sources[known], component, found[known])
            why = "in another order" if known == name else f"under another name than before ('{known}')"
            notes.append(f"warning: source '{name}' is read {why}: {again:,} rows of the pass under way come again")
        elif old is not None:
            notes.append(
                f"warning: source '{name}' is another dataset than before: it begins at its first row; of the former "
                f"one {old.read:,} "
                "samples were read, and rows that are in both come again"
            )
        else:
            notes.append(f"source '{name}' is new: it begins at its first row")
    gone = [name for name in old_sources if name not in sources]
    return sources, notes + [
        f"source '{name}' is no longer read, after {found[name].read:,} samples" for name in gone if name in found
    ]


def _of_grown(cursor: SourceCursor, dataset_id: str, rows: int) -> SourceCursor:
    """A cursor into a dataset of so many rows, as one into the dataset that grew from it: its rows are the first
    there.
    """
    counts = (*cursor.rows, *[rows] * (len(cursor.subsets) - len(cursor.rows)))
    return cursor.model_copy(update={"dataset_id": dataset_id, "rows": counts})


def _told_of_rows(
    data: DataConfig,
    before: DataConfig,
    source: SourceConfig,
    former: SourceConfig,
    component: OrderedSource,
    cursor: SourceCursor,
    size: int | None,
) -> Iterator[str]:
    """What the pass under way still holds of a source that goes on. size: how many rows its dataset had, where it has
    grown.
    """
    name, order = source.name, component.order
    assert isinstance(order, RowOrder)
    if cursor.place:
        order = pass_order(data, source, component.shards, (*cursor.subsets, source.subset), cursor.rows)
        now, was = (
            order.skipped,
            pass_order(before, former, component.shards, cursor.subsets, cursor.rows, size).skipped,
        )
        for ranges, told in (
            (without(now, was), "that are left out from now on were read before"),
            (without(was, now), "that are no longer left out were passed over in this pass and come in the next"),
        ):
            if passed := order.num_passed(ranges, cursor.turn, cursor.place):
                yield f"source '{name}': {passed:,} of the {sum(stop - first for first, stop in ranges):,} rows {told}"
    left = (cursor.turn + 1) * order.num_rows - order.samples_before(cursor.turn, cursor.place)
    yield (
        f"source '{name}' goes on after {cursor.read:,} samples: {left:,} rows are left of the pass under way, each "
        "comes once"
    )


def _come_again(
    data: DataConfig,
    old: DataConfig,
    source: SourceConfig,
    former: SourceConfig,
    component: OrderedSource,
    cursor: SourceCursor,
) -> int:
    """How many rows that the pass under way has read come once more because the source begins again."""
    was = pass_order(old, former, component.shards, cursor.subsets, cursor.rows)
    now = pass_order(data, source, component.shards, (source.subset,))
    held = without([(rows.first, rows.first + rows.count) for rows in now.row_ranges], now.skipped)
    return was.num_passed(held, cursor.turn, cursor.place) - was.num_passed(
        _overlap(held, was.skipped), cursor.turn, cursor.place
    )


def _overlap(ranges: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return without(ranges, without(ranges, others))
