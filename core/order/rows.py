"""In which order a source's rows come (each epoch a keyed permutation of all of them, or chunk after chunk, with
skipped rows stepped over), and which samples of that order a step of the run reads.

The order is not stored: the row of the k-th sample is computed from k, the seed, a few numbers for each epoch and
chunk, and the places of skipped rows (core/order/kept_rows.py). A set of 10^12 rows costs as much memory as one of ten,
and a position is one integer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TypeVar

import numpy as np

from weftrain.core.config import Continuation, DataConfig, Recipe
from weftrain.core.order import feistel
from weftrain.core.order.kept_rows import KeptPlaces, Range, count_before, kept_places, within
from weftrain.core.order.mixture import SampleOrder

_Number = TypeVar("_Number", int, np.ndarray)


@dataclass(frozen=True)
class Stretch:
    """Rows first..first + count - 1 of a set, of one epoch, permuted among themselves. chunk: of the dataset, or
    None.
    """

    first: int
    count: int
    epoch: int
    chunk: int | None


@dataclass(frozen=True)
class RowOrder:
    """The order of a source's rows: its stretches one after the other, and from the first again, each time in another
    order.

    skipped: ranges [first, stop) of rows that never come, sorted and apart. Their places in the order are stepped over,
    so that a row that is skipped moves no other row. sequential: the rows as they lie, always. A *pass* is all
    stretches once; a *place* is a row's number in a pass, skipped rows counted.
    """

    seed: int
    name: str
    stretches: tuple[Stretch, ...]
    skipped: tuple[Range, ...] = ()
    sequential: bool = False

    @cached_property
    def _left_out(self) -> tuple[tuple[Range, ...], ...]:
        """Of each stretch: the ranges of its rows that are skipped, counted from its first row."""
        return tuple(within(self.skipped, stretch.first, stretch.first + stretch.count) for stretch in self.stretches)

    @cached_property
    def _ends(self) -> list[int]:
        """Kept rows of the pass up to the end of each stretch."""
        left_out = [sum(stop - first for first, stop in ranges) for ranges in self._left_out]
        return list(accumulate(stretch.count - count for stretch, count in zip(self.stretches, left_out, strict=True)))

    @property
    def num_rows(self) -> int:
        """Rows that come before the first comes again."""
        return self._ends[-1]

    @cached_property
    def num_places(self) -> int:
        """Rows of a pass, skipped ones counted."""
        return sum(stretch.count for stretch in self.stretches)

    @cached_property
    def num_epochs(self) -> int:
        return 1 + max(stretch.epoch for stretch in self.stretches)

    def rows(self, k: np.ndarray) -> np.ndarray:
        """int64 [n], the source's k-th samples -> row numbers of the set, [n]."""
        if not len(k):
            return np.empty(0, dtype=np.int64)
        low, high = int(k.min()), int(k.max())
        turn, within_pass = divmod(low, self.num_rows)
        number = bisect_right(self._ends, within_pass)
        if high - low < self._ends[number] - within_pass:  # nearly always: all of one stretch of one pass
            return self._rows_of(turn, number, k - (low - within_pass + self._start(number)))
        rows = np.empty(k.shape, dtype=np.int64)
        turns, within_passes = np.divmod(k, self.num_rows)
        numbers = np.searchsorted(np.array(self._ends), within_passes, side="right")
        for turn in np.unique(turns).tolist():
            for number in np.unique(numbers[turns == turn]).tolist():
                chosen = (turns == turn) & (numbers == number)
                rows[chosen] = self._rows_of(turn, number, within_passes[chosen] - self._start(number))
        return rows

    def _rows_of(self, turn: int, number: int, kept: np.ndarray) -> np.ndarray:
        """int64 [n], numbers of kept rows of a stretch in the order of pass `turn` -> row numbers of the set, [n]."""
        stretch = self.stretches[number]
        if self._left_out[number]:
            kept = self._kept(turn, number).places(kept)
        return stretch.first + (
            kept if self.sequential else feistel.lookup(kept, stretch.count, self._row_key(turn, stretch))
        )

    def place(self, k: int) -> tuple[int, int]:
        """The pass in which the k-th sample comes, from 0, and its place there."""
        turn, within_pass = divmod(k, self.num_rows)
        number = bisect_right(self._ends, within_pass)
        local = within_pass - self._start(number)
        if self._left_out[number]:
            local = int(self._kept(turn, number).places(np.array([local]))[0])
        return turn, sum(stretch.count for stretch in self.stretches[:number]) + local

    def samples_before(self, turn: int, place: int) -> int:
        """How many samples come before `place` of pass `turn`: the first kept row from there on is the sample of that
        number.
        """
        count = turn * self.num_rows
        for number, stretch in enumerate(self.stretches):
            local = min(place, stretch.count)
            count += self._kept(turn, number).before(local) if self._left_out[number] and local < stretch.count else 0
            if local == stretch.count:
                count += self._ends[number] - self._start(number)
            elif not self._left_out[number]:
                count += local
            place -= local
        return count

    def num_passed(self, ranges: Sequence[Range], turn: int, place: int) -> int:
        """How many of the rows in `ranges` stand before `place` of pass `turn`."""
        count = 0
        for stretch in self.stretches:
            if place <= 0:
                break
            inside = within(ranges, stretch.first, stretch.first + stretch.count)
            if place >= stretch.count:
                count += sum(stop - first for first, stop in inside)
            else:
                count += count_before(
                    place, inside, stretch.count, None if self.sequential else self._row_key(turn, stretch)
                )
            place -= stretch.count
        return count

    def epoch(self, k: int) -> int:
        """Which time, from 0, the k-th sample's document comes."""
        turn, within_pass = divmod(k, self.num_rows)
        return turn * self.num_epochs + self.stretches[bisect_right(self._ends, within_pass)].epoch

    def chunk(self, k: int) -> int | None:
        """Which of the dataset's chunks the k-th sample is of, where it has chunks."""
        return self.stretches[bisect_right(self._ends, k % self.num_rows)].chunk

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def _kept(self, turn: int, number: int) -> KeptPlaces:
        stretch = self.stretches[number]
        return kept_places(
            stretch.count, None if self.sequential else self._row_key(turn, stretch), self._left_out[number]
        )

    def _row_key(self, turn: int, stretch: Stretch) -> bytes:
        return _row_key(self.seed, self.name, turn * self.num_epochs + stretch.epoch, stretch.chunk)


@dataclass(frozen=True)
class ResumedOrder:
    """A source's order that goes on in mid-pass: first what is left of pass `turn` of `current` from `place` on, then
    `then`'s passes.

    The two differ where the source's subset has changed since the pass began. k counts from where it goes on.
    """

    current: RowOrder
    then: RowOrder
    turn: int
    at: int  # the place

    @cached_property
    def _start(self) -> int:
        return self.current.samples_before(self.turn, self.at)

    @cached_property
    def _left(self) -> int:
        """Samples left of the pass."""
        return (self.turn + 1) * self.current.num_rows - self._start

    @property
    def num_rows(self) -> int:
        return self.then.num_rows

    @property
    def num_epochs(self) -> int:
        return self.then.num_epochs

    def rows(self, k: np.ndarray) -> np.ndarray:
        """See RowOrder.rows."""
        if self.current == self.then:
            return self.then.rows(self._start + k)
        rows, early = np.empty(k.shape, dtype=np.int64), k < self._left
        if early.any():
            rows[early] = self.current.rows(self._start + k[early])
        if not early.all():
            rows[~early] = self.then.rows(self._later(k[~early]))
        return rows

    def epoch(self, k: int) -> int:
        """See RowOrder.epoch."""
        return self.current.epoch(self._start + k) if k < self._left else self.then.epoch(self._later(k))

    def chunk(self, k: int) -> int | None:
        """See RowOrder.chunk."""
        return self.current.chunk(self._start + k) if k < self._left else self.then.chunk(self._later(k))

    def in_current(self, k: int) -> bool:
        return k < self._left

    def place(self, k: int) -> tuple[int, int]:
        """See RowOrder.place; of `current` or of `then`, as `in_current` says."""
        return self.current.place(self._start + k) if k < self._left else self.then.place(self._later(k))

    def _later(self, k: _Number) -> _Number:
        return (self.turn + 1) * self.then.num_rows + k - self._left


@lru_cache(maxsize=1024)
def _row_key(seed: int, name: str, epoch: int, chunk: int | None) -> bytes:
    return feistel.derive_key("rows", seed, name, epoch, *(() if chunk is None else (chunk,)))


def stretches(epochs: Sequence[tuple[int, int]], chunk_rows: int | None, first_epoch: int = 0) -> tuple[Stretch, ...]:
    """(first row, rows) of each epoch, cut at the ends of the dataset's chunks where it has them."""
    result = []
    for epoch, (first, count) in enumerate(epochs, first_epoch):
        if chunk_rows is None:
            result.append(Stretch(first, count, epoch, None))
            continue
        for chunk in range(first // chunk_rows, -(-(first + count) // chunk_rows)):
            low, high = max(first, chunk * chunk_rows), min(first + count, (chunk + 1) * chunk_rows)
            result.append(Stretch(low, high - low, epoch, chunk))
    return tuple(result)


@dataclass(frozen=True)
class ChunkOrder:
    """Chunks of a run, each `samples` samples; `order`: which chunk's samples stand at each place, deferred ones last,
    dropped ones not.

    After the last of `order` the stream goes on behind the last chunk, so that a run that drops a chunk is as long as
    it was. first_sample: number of the sample with which place 0 would begin at the present batch size. shift: numbers
    of the stream that lie before the sample from which it is counted.
    """

    count: int
    samples: int
    order: tuple[int, ...]
    first_sample: int = 0
    shift: int = 0

    @cached_property
    def _beyond(self) -> int:
        return max((self.count, *(chunk + 1 for chunk in self.order)))

    def chunk_at(self, place: int) -> int:
        return self.order[place] if place < len(self.order) else self._beyond + place - len(self.order)

    def renumber(self, samples: np.ndarray) -> np.ndarray:
        """int64 [n] numbers in the run's order -> in the order without a skip list."""
        if self.order == tuple(range(self._beyond)):
            return samples - self.first_sample - self.shift
        places, inside = np.divmod(samples - self.first_sample, self.samples)
        known = np.array(self.order, dtype=np.int64)
        beyond = self._beyond + places - len(known)
        chunks = np.where(places < len(known), known[np.minimum(places, len(known) - 1)], beyond)
        result: np.ndarray = chunks * self.samples + inside - self.shift
        return result

    def spans(self, first: int, stop: int) -> Iterator[Range]:
        """The samples first..stop-1 of the run's order as ranges [first, stop) of numbers in the order without a skip
        list.
        """
        while first < stop:
            place, inside = divmod(first - self.first_sample, self.samples)
            start = self.chunk_at(place) * self.samples + inside - self.shift
            length = min(stop - first, self.samples - inside)
            yield start, start + length
            first += length


def chunk_order(data: DataConfig, steps: int, global_batch_size: int) -> ChunkOrder:
    """The chunks of a run of so many steps, with its skip list. data.chunks divides the steps; Recipe has checked it.

    Chunks that were begun before the section stay where they were read; the others follow, deferred ones last.
    """
    assert data.chunks is not None
    begun = Continuation(step=0, sample=0) if data.continues is None else data.continues
    actions = {entry.chunk: entry.action for entry in data.skip if entry.chunk is not None}
    left = sorted(set(range(data.chunks)) - set(begun.chunks))
    kept = [chunk for chunk in left if chunk not in actions]
    deferred = [chunk for chunk in left if actions.get(chunk) == "defer"]
    samples = steps // data.chunks * global_batch_size
    return ChunkOrder(
        data.chunks,
        samples,
        (*begun.chunks, *kept, *deferred),
        begun.sample - begun.step * global_batch_size,
        begun.base_chunk * samples + begun.base_within,
    )


@dataclass(frozen=True)
class Timeline:
    """Which samples a step reads. A sample has a number in the run, which counts what was read, and one in the stream
    of its data section.

    first_step, first_sample: where the section begins. base_sample: the run's number of the stream's sample 0.
    """

    global_batch_size: int
    first_step: int = 0
    first_sample: int = 0
    base_sample: int = 0
    chunks: ChunkOrder | None = None

    def sample(self, step: int) -> int:
        """The number in the run of the first sample of 0-based step `step`. Raises ValueError for a step before the
        section.
        """
        if step < self.first_step:
            raise ValueError(
                f"step {step} lies before step {self.first_step}, where this data section begins (data.continues)"
            )
        return self.first_sample + (step - self.first_step) * self.global_batch_size

    def chunk_at(self, step: int) -> int | None:
        """Which of the run's chunks the batch of `step` is of; None where the run has none."""
        chunks = self.chunks
        return None if chunks is None else chunks.chunk_at((self.sample(step) - chunks.first_sample) // chunks.samples)

    def numbers(self, samples: np.ndarray) -> np.ndarray:
        """int64 [n] numbers in the run -> in the stream."""
        return samples - self.base_sample if self.chunks is None else self.chunks.renumber(samples)

    def spans(self, first: int, stop: int) -> Iterator[Range]:
        """The run's samples first..stop-1 as ranges [first, stop) of numbers in the stream, in the order in which they
        are read.
        """
        if self.chunks is None:
            yield first - self.base_sample, stop - self.base_sample
        else:
            yield from self.chunks.spans(first, stop)

    def read_chunks(self, step: int) -> tuple[int, ...]:
        """The run's chunks that were begun before `step`, in the order in which they were read."""
        if self.chunks is None:
            return ()
        places = -(-(self.sample(step) - self.chunks.first_sample) // self.chunks.samples)
        return tuple(self.chunks.chunk_at(place) for place in range(places))

    def front(self, step: int) -> tuple[int, int]:
        """Of a run with chunks: the chunk, and the sample in it, behind all that was read before `step`."""
        assert self.chunks is not None
        within_chunk = (self.sample(step) - self.chunks.first_sample) % self.chunks.samples
        read = self.read_chunks(step)
        last = max(read, default=-1)
        return (last, within_chunk) if within_chunk and read[-1] == last else (last + 1, 0)

    def next_number(self, step: int) -> int:
        """The number in the stream behind all that was read before `step`."""
        if self.chunks is None:
            return self.sample(step) - self.base_sample
        chunk, within_chunk = self.front(step)
        return chunk * self.chunks.samples + within_chunk - self.chunks.shift

    def counts(self, mixture: SampleOrder, step: int) -> list[int]:
        """How many samples of each source the stream gives before `step`."""
        return sample_counts(mixture, self.chunks, self.sample(step), self.base_sample)


def timeline(data: DataConfig, steps: int | None, global_batch_size: int) -> Timeline:
    """Of a recipe's data section. steps: of the run, where it has chunks."""
    chunks = None if data.chunks is None or steps is None else chunk_order(data, steps, global_batch_size)
    if data.continues is None:
        return Timeline(global_batch_size, chunks=chunks)
    begun = data.continues
    return Timeline(global_batch_size, begun.step, begun.sample, begun.base_sample, chunks)


def recipe_timeline(recipe: Recipe) -> Timeline:
    """Of a whole recipe."""
    return timeline(recipe.data, recipe.schedule.steps, recipe.batch.global_batch_size)


def sample_counts(mixture: SampleOrder, chunks: ChunkOrder | None, samples: int, first: int = 0) -> list[int]:
    """How many of a run's samples first..samples-1 are of each source, its skipped chunks considered. first: where the
    stream begins.
    """
    if chunks is None:
        return mixture.counts(samples - first)
    totals: list[int] = [0] * len(mixture.counts(0))
    for start, stop in chunks.spans(first, samples):
        for index, (low, high) in enumerate(zip(mixture.counts(start), mixture.counts(stop), strict=True)):
            totals[index] += high - low
    return totals
