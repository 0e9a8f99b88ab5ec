"""A source of the mixture: the rows of its subset in order, without skipped ones, resumed after a change of data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset_manifest import SourceCursor, Subset
from weftrain.core.formats.reference_file import Reference
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.order.data_section import DataConfig, SourceConfig
from weftrain.core.order.row_order import ResumedOrder, RowOrder, RowRange, row_ranges
from weftrain.core.order.row_selection import Range, merged, without


@dataclass(frozen=True)
class OrderedSource:
    """A set of a dataset and the order of its rows. cursor: how far it had been read where the order begins."""

    name: str
    shards: ShardSet
    order: RowOrder | ResumedOrder
    subset: Subset
    cursor: SourceCursor | None = None
    reference: Reference | None = None  # of pairs: their log-probabilities

    @property
    def num_rows(self) -> int:
        """Rows of a pass without the skipped ones."""
        return self.order.num_rows

    def row_numbers(self, k: np.ndarray) -> np.ndarray:
        """int64 [n], sample indices within the source -> row numbers of the set. Each epoch has every row once."""
        return self.order.rows(k)

    def cursor_at(self, k: int) -> SourceCursor:
        """How far the source has been read before its sample k."""
        before = self.cursor
        if k == 0 and before is not None:
            return before
        turn, place = self.order.place(k - 1) if k else (0, -1)
        same_pass = isinstance(self.order, ResumedOrder) and k > 0 and self.order.in_current(k - 1)
        subsets, rows = (before.subsets, before.rows) if same_pass and before is not None else ((self.subset,), ())
        read = k + (0 if before is None else before.read)
        return SourceCursor(
            dataset_id=self.shards.entry.id, read=read, turn=turn, place=place + 1, subsets=subsets, rows=rows
        )


def ordered_source(data: DataConfig, source: SourceConfig, shards: ShardSet) -> OrderedSource:
    """A source's rows in order: the subset of each prepared epoch, in the dataset's chunks, without skipped rows."""
    skipped = skipped_rows(data, source.name)
    if skipped and skipped[-1][1] > shards.num_rows:
        raise DataError(
            f"data.skip: rows {list(skipped[-1])} of source '{source.name}' lie beyond its {shards.num_rows:,} rows: "
            "correct them"
        )
    order = pass_order(data, source, shards, (source.subset,))
    if not order.num_rows:
        raise DataError(f"data.skip: every row of source '{source.name}' is skipped; leave the source out instead")
    cursor = None if data.continues is None else data.continues.sources.get(source.name)
    if cursor is None:
        return OrderedSource(source.name, shards, order, source.subset)
    if cursor.dataset_id != shards.entry.id:
        raise DataError(
            f"{shards.folder}: dataset {shards.entry.id[:12]}, and data.continues of source '{source.name}' is of "
            f"{cursor.dataset_id[:12]}: restore that dataset, or resume the run, which finds out what goes on"
        )
    as_now = cursor.subsets == (source.subset,) and not cursor.rows
    current = order if as_now else pass_order(data, source, shards, cursor.subsets, cursor.rows)
    if cursor.place > current.num_places:
        raise DataError(
            f"data.continues: source '{source.name}' has {current.num_places:,} rows a pass, and stood at "
            f"{cursor.place:,}"
        )
    return OrderedSource(
        source.name, shards, ResumedOrder(current, order, cursor.turn, cursor.place), source.subset, cursor
    )


def skipped_rows(data: DataConfig, source: str) -> tuple[Range, ...]:
    """The rows of a source that data.skip names, as sorted ranges [first, stop)."""
    return merged([entry.rows for entry in data.skip if entry.source == source and entry.rows is not None])


def pass_order(
    data: DataConfig,
    source: SourceConfig,
    shards: ShardSet,
    subsets: Sequence[Subset],
    rows: Sequence[int] = (),
    size: int | None = None,
) -> RowOrder:
    """A pass over the first of `subsets`, then over what each later one adds; rows outside the source's own subset are
    skipped. rows: the set's size under each of the first subsets, if it has grown since. size: its size now, or all.
    """
    chunk_rows = None if shards.manifest.chunks is None else shards.manifest.chunks.rows
    parts: list[RowRange] = []
    covered: tuple[Range, ...] = ()
    for index, subset in enumerate(subsets):
        ranges = subset_rows(source.name, shards, subset, rows[index] if index < len(rows) else None)
        for epoch, whole in enumerate(ranges):
            for first, stop in without([whole], covered):
                parts += row_ranges([(first, stop - first)], chunk_rows, epoch)
        covered = merged([*covered, *ranges])
    outside = without(covered, subset_rows(source.name, shards, source.subset, size))
    return RowOrder(
        data.shuffle_seed,
        source.name,
        tuple(parts),
        merged([*skipped_rows(data, source.name), *outside]),
        data.order == "cerebras",
    )


def subset_rows(name: str, shards: ShardSet, subset: Subset, rows: int | None = None) -> list[Range]:
    """The rows [first, stop) of a subset in each prepared epoch. rows: the set's earlier size, in one epoch. Raises
    DataError if a range is empty.
    """
    if rows is not None and (len(shards.entry.epochs) > 1 or rows > shards.num_rows):
        raise DataError(
            f"{shards.folder}: data.continues of source '{name}' counts {rows:,} rows, which it has not: restore the "
            "dataset"
        )
    ranges, first = [], 0
    for count in shards.entry.epochs if rows is None else (rows,):
        low, high = (math.floor(Fraction(repr(bound)) * count) for bound in subset)
        if high == low:
            raise DataError(
                f"{shards.folder}: subset {list(subset)} of source '{name}' holds no row of {count}: widen it"
            )
        ranges.append((first + low, first + high))
        first += count
    return ranges
