"""Where the rows of consecutive samples lie, planned in blocks: which shard, and which position in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from weftrain.core.formats.shard_reader import ShardReader
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.order.mixture import SampleOrder
from weftrain.core.order.row_selection import Range
from weftrain.core.order.source_order import OrderedSource

# A call of numpy takes a microsecond, and each source needs ten: so thousands of rows are located at once.
MIN_ROWS, MAX_ROWS = 64, 4096


class ShardReaders(dict[int, ShardReader]):
    """The shards of several sets, numbered through, each opened when it is first asked for."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        super().__init__()
        self._sets = sets
        self._ends = list(accumulate(len(shards.entry.shards) for shards in sets))

    def __missing__(self, number: int) -> ShardReader:
        index = bisect_right(self._ends, number)
        first = self._ends[index - 1] if index else 0
        return self.setdefault(number, self._sets[index].reader(number - first))


@dataclass(frozen=True)
class RowPlan:
    """Where the rows of consecutive samples lie: the shard, numbered through all sources, and the position in it."""

    shards: list[int]
    positions: list[int]


def block_size(sources: Sequence[OrderedSource]) -> int:
    """How many samples are planned at once: fewer if more would only repeat the same rows."""
    return min(MAX_ROWS, max(MIN_ROWS, sum(source.num_rows for source in sources)))


def make_plan(sources: Sequence[OrderedSource], mixture: SampleOrder, rows: int, block: int) -> RowPlan:
    """Where samples [block * rows, (block + 1) * rows) lie."""
    of_source, k = mixture.locate(np.arange(block * rows, (block + 1) * rows, dtype=np.int64))
    shard, position = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64)
    first_shard = 0
    for index, source in enumerate(sources):
        chosen = np.flatnonzero(of_source == index)
        of_shard, row = source.shards.places(source.row_numbers(k[chosen]))
        shard[chosen], position[chosen] = of_shard + first_shard, row * source.shards.manifest.row_stride
        first_shard += len(source.shards.entry.shards)
    return RowPlan(shard.tolist(), position.tolist())


def block_parts(samples: Range, size: int) -> Iterator[tuple[int, slice]]:
    """A range of samples [first, stop) as parts of blocks of `size`: which block, and the slice of it."""
    first, stop = samples
    while first < stop:
        block, low = divmod(first, size)
        high = min(size, low + stop - first)
        yield block, slice(low, high)
        first += high - low
