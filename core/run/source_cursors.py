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
            "source begins at its first row"
        ]
    sources: dict[str, SourceCursor] = {}
    notes: list[str] = []
    for given, source in zip(asked.data.sources, fresh.sources, strict=True):
        sources[given.name], told = _continued_source(asked.data, before.data, given, source, found)
        notes += told
    gone = [old.name for old in before.data.sources if old.name not in sources and old.name in found]
    return sources, notes + [f"source '{name}' is no longer read, after {found[name].read:,} samples" for name in gone]


def _continued_source(
    data: DataConfig,
    before: DataConfig,
    given: SourceConfig,
    source: OrderedSource,
    found: Mapping[str, SourceCursor],
) -> tuple[SourceCursor, list[str]]:
    """Where one source goes on, in the pass under way if its dataset and order are the same; and what is to be said."""
    name, dataset_id, old, notes = given.name, source.shards.entry.id, found.get(given.name), list[str]()
    if old is not None and (data.shuffle_seed, data.order) == (before.shuffle_seed, before.order):
        size = source.shards.manifest.rows_of_ancestor(old.dataset_id)
        if size is not None:
            old = _of_grown(old, dataset_id, size)
            where = ": they come at the end of the pass under way" if old.place else ""
            notes.append(f"source '{name}' has grown by {source.shards.num_rows - size:,} rows{where}")
        if old.dataset_id == dataset_id:
            same_subset = old.subsets[-1] == given.subset and len(old.rows) < len(old.subsets)
            subsets = old.subsets if same_subset else (*old.subsets, given.subset)
            update = {"subsets": subsets} if old.place else {"subsets": (given.subset,), "rows": ()}
            former = next((one for one in before.sources if one.name == name), given)
            notes += _told_of_rows(data, before, given, former, source, old, size)
            return old.model_copy(update=update), notes
    read = 0 if old is None else old.read
    start = SourceCursor(dataset_id=dataset_id, read=read, turn=0, place=0, subsets=(given.subset,))
    return start, [_why_from_first_row(data, before, given, source, found)]


def _why_from_first_row(
    data: DataConfig,
    before: DataConfig,
    given: SourceConfig,
    source: OrderedSource,
    found: Mapping[str, SourceCursor],
) -> str:
    """Why a source begins at its first row, and which of its rows come again."""
    name, old = given.name, found.get(given.name)
    asked = {one.name for one in data.sources}
    same = {one.name: one for one in before.sources if one.name in found}
    same = {key: one for key, one in same.items() if found[key].dataset_id == source.shards.entry.id}
    known = name if name in same else next((one for one in found if one in same and one not in asked), None)
    if known is not None:
        again = _come_again(data, before, given, same[known], source, found[known])
        why = "in another order" if known == name else f"under another name than before ('{known}')"
        return f"warning: source '{name}' is read {why}: {again:,} rows of the pass under way come again"
    if old is not None:
        return (
            f"warning: source '{name}' is another dataset than before: it begins at its first row; of the former one "
            f"{old.read:,} samples were read, and rows that are in both come again"
        )
    return f"source '{name}' is new: it begins at its first row"


def _of_grown(cursor: SourceCursor, dataset_id: str, rows: int) -> SourceCursor:
    """A cursor into a dataset of `rows` rows, as one into the dataset that grew from it by adding rows at the end."""
    counts = (*cursor.rows, *[rows] * (len(cursor.subsets) - len(cursor.rows)))
    return cursor.model_copy(update={"dataset_id": dataset_id, "rows": counts})


def _told_of_rows(
    data: DataConfig,
    before: DataConfig,
    source: SourceConfig,
    former: SourceConfig,
    ordered: OrderedSource,
    cursor: SourceCursor,
    size: int | None,
) -> Iterator[str]:
    """What the pass under way still holds of a source that goes on. size: the rows of its dataset before it grew."""
    name, order = source.name, ordered.order
    assert isinstance(order, RowOrder)
    if cursor.place:
        order = pass_order(data, source, ordered.shards, (*cursor.subsets, source.subset), cursor.rows)
        now, was = (
            order.skipped,
            pass_order(before, former, ordered.shards, cursor.subsets, cursor.rows, size).skipped,
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
    ordered: OrderedSource,
    cursor: SourceCursor,
) -> int:
    """How many rows that the pass under way has read come once more because the source begins again."""
    was = pass_order(old, former, ordered.shards, cursor.subsets, cursor.rows)
    now = pass_order(data, source, ordered.shards, (source.subset,))
    held = without([(rows.first, rows.first + rows.count) for rows in now.row_ranges], now.skipped)
    return was.num_passed(held, cursor.turn, cursor.place) - was.num_passed(
        _overlap(held, was.skipped), cursor.turn, cursor.place
    )


def _overlap(ranges: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return without(ranges, without(ranges, others))
