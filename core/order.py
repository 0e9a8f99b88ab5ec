"""In which order a source's rows come: each epoch a keyed permutation of them, or chunk after chunk, without those that are skipped.

What a reader would get wrong: nothing is materialised. The row of the k-th sample is computed from k, the seed and a few numbers for each
epoch, chunk and skipped range, so a set of 10^12 rows costs as much memory as one of ten, and position is one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from weftrain.core import feistel
from weftrain.core.config import DataConfig
from weftrain.core.errors import DataError
from weftrain.core.mixture import SampleOrder


@dataclass(frozen=True)
class Stretch:
    """Rows first..first + count - 1 of a set, of one epoch, permuted among themselves. chunk: of the dataset, or None."""

    first: int
    count: int
    epoch: int
    chunk: int | None


@dataclass(frozen=True)
class RowOrder:
    """The order of a source's rows: its stretches one after the other, and from the first again, each time in another order.

    skipped: ranges [first, stop) of rows that never come, sorted and apart. sequential: the rows as they lie, always.
    """

    seed: int
    name: str
    stretches: tuple[Stretch, ...]
    skipped: tuple[tuple[int, int], ...] = ()
    sequential: bool = False

    @cached_property
    def _kept(self) -> tuple[np.ndarray, ...]:
        """Of each stretch: where its kept rows begin in the count of kept rows of the set, and how many they are."""
        begins = np.array([self._rank(stretch.first) for stretch in self.stretches], dtype=np.int64)
        stops = np.array([self._rank(stretch.first + stretch.count) for stretch in self.stretches], dtype=np.int64)
        return begins, np.cumsum(stops - begins)

    def _rank(self, row: int) -> int:
        """How many kept rows of the set lie before `row`."""
        return row - sum(min(stop, row) - first for first, stop in self.skipped if first < row)

    @cached_property
    def _gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept rows before each skipped range, and skipped rows up to its end."""
        lengths = [stop - first for first, stop in self.skipped]
        return np.array([self._rank(first) for first, _ in self.skipped], dtype=np.int64), np.cumsum([0, *lengths])

    @property
    def num_rows(self) -> int:
        """Rows that come before the first comes again."""
        return int(self._kept[1][-1])

    @property
    def num_epochs(self) -> int:
        return self.stretches[-1].epoch + 1

    def rows(self, k: np.ndarray) -> np.ndarray:
        """int64 [n], the source's k-th samples -> row numbers of the set, [n]."""
        begins, ends = self._kept
        rounds, within = np.divmod(k, self.num_rows)
        plain = len(self.stretches) == 1 and not self.skipped and not self.sequential and len(k) > 0
        if plain and int(rounds.min()) == int(rounds.max()):  # nearly always
            first = self.stretches[0]
            return first.first + feistel.lookup(within, self.num_rows, self._key(int(rounds[0]), first))
        places = np.searchsorted(ends, within, side="right")
        ranks = np.empty(k.shape, dtype=np.int64)
        for turn, place in sorted(set(zip(rounds.tolist(), places.tolist(), strict=True))):
            chosen = (rounds == turn) & (places == place)
            start = int(ends[place - 1]) if place else 0
            local, count = within[chosen] - start, int(ends[place]) - start
            if not self.sequential:
                local = feistel.lookup(local, count, self._key(turn, self.stretches[place]))
            ranks[chosen] = begins[place] + local
        if not self.skipped:
            return ranks
        before, skipped = self._gaps
        rows: np.ndarray = ranks + skipped[np.searchsorted(before, ranks, side="right")]
        return rows

    def epoch(self, k: int) -> int:
        """Which time, from 0, the k-th sample's document comes."""
        turn, within = divmod(k, self.num_rows)
        return turn * self.num_epochs + self.stretches[int(np.searchsorted(self._kept[1], within, side="right"))].epoch

    def chunk(self, k: int) -> int | None:
        """Which of the dataset's chunks the k-th sample is of, where it has chunks."""
        return self.stretches[int(np.searchsorted(self._kept[1], k % self.num_rows, side="right"))].chunk

    def _key(self, turn: int, stretch: Stretch) -> bytes:
        return _row_key(self.seed, self.name, turn * self.num_epochs + stretch.epoch, stretch.chunk)


@lru_cache(maxsize=1024)
def _row_key(seed: int, name: str, epoch: int, chunk: int | None) -> bytes:
    return feistel.derive_key("rows", seed, name, epoch, *(() if chunk is None else (chunk,)))


def stretches(epochs: Sequence[tuple[int, int]], chunk_rows: int | None) -> tuple[Stretch, ...]:
    """(first row, rows) of each epoch, cut at the ends of the dataset's chunks where it has them."""
    result = []
    for epoch, (first, count) in enumerate(epochs):
        if chunk_rows is None:
            result.append(Stretch(first, count, epoch, None))
            continue
        for chunk in range(first // chunk_rows, -(-(first + count) // chunk_rows)):
            low, high = max(first, chunk * chunk_rows), min(first + count, (chunk + 1) * chunk_rows)
            result.append(Stretch(low, high - low, epoch, chunk))
    return tuple(result)


def without_empty(order: RowOrder) -> RowOrder:
    """The order without stretches of which every row is skipped. Raises DataError where nothing is left."""
    kept = tuple(stretch for stretch in order.stretches if order._rank(stretch.first + stretch.count) > order._rank(stretch.first))
    if not kept:
        raise DataError(f"data.skip: every row of source '{order.name}' is skipped; leave the source out instead")
    return RowOrder(order.seed, order.name, kept, order.skipped, order.sequential)


@dataclass(frozen=True)
class ChunkOrder:
    """Chunks of a run, each `samples` samples; `order`: which chunk's samples stand at each place, deferred ones last, dropped ones not.

    After the last of `order` the stream goes on behind the last chunk, so that a run that drops a chunk is as long as it was.
    """

    count: int
    samples: int
    order: tuple[int, ...]

    def chunk_at(self, place: int) -> int:
        return self.order[place] if place < len(self.order) else self.count + place - len(self.order)

    def renumber(self, samples: np.ndarray) -> np.ndarray:
        """int64 [n] numbers in the run's order -> in the order without a skip list."""
        if self.order == tuple(range(self.count)):
            return samples
        places, within = np.divmod(samples, self.samples)
        known = np.array(self.order, dtype=np.int64)
        beyond = self.count + places - len(known)
        chunks = np.where(places < len(known), known[np.minimum(places, len(known) - 1)], beyond)
        result: np.ndarray = chunks * self.samples + within
        return result


def chunk_order(data: DataConfig, steps: int, global_batch_size: int) -> ChunkOrder:
    """The chunks of a run of so many steps, with its skip list. data.chunks divides the steps; Recipe has checked it."""
    assert data.chunks is not None
    actions = {entry.chunk: entry.action for entry in data.skip if entry.chunk is not None}
    kept = [chunk for chunk in range(data.chunks) if chunk not in actions]
    deferred = [chunk for chunk in range(data.chunks) if actions.get(chunk) == "defer"]
    return ChunkOrder(data.chunks, steps // data.chunks * global_batch_size, (*kept, *deferred))


def sample_counts(mixture: SampleOrder, chunks: ChunkOrder | None, samples: int) -> list[int]:
    """How many of a run's first `samples` samples are of each source, its skipped chunks considered."""
    if chunks is None or chunks.order == tuple(range(chunks.count)):
        return mixture.counts(samples)
    places, rest = divmod(samples, chunks.samples)
    totals: list[int] = [0] * len(mixture.counts(0))
    for place, length in [*((place, chunks.samples) for place in range(places)), (places, rest)]:
        start = chunks.chunk_at(place) * chunks.samples
        for index, (low, high) in enumerate(zip(mixture.counts(start), mixture.counts(start + length), strict=True)):
            totals[index] += high - low
    return totals
