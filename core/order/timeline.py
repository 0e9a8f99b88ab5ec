"""Which samples each step of a run reads: batch sizes, chunks and their order, and where a data section begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from weftrain.core.order.data_section import Continuation, DataConfig
from weftrain.core.order.mixture import SampleOrder
from weftrain.core.order.row_selection import Range


@dataclass(frozen=True)
class ChunkOrder:
    """The order of a run's chunks of `samples` samples each. order: the chunk at each place: deferred ones come last,
    dropped ones are missing. After them the stream continues behind the last chunk, so that dropping a chunk does not
    shorten the run. first_sample: the sample at which place 0 would begin at the present batch size. shift: the
    stream's sample 0 as a number in the order without a skip list.
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
        """int64 [n] sample numbers in the run's order -> numbers in the order without a skip list."""
        if self.order == tuple(range(self._beyond)):
            return samples - self.first_sample - self.shift
        places, inside = np.divmod(samples - self.first_sample, self.samples)
        known = np.array(self.order, dtype=np.int64)
        beyond = self._beyond + places - len(known)
        chunks = np.where(places < len(known), known[np.minimum(places, len(known) - 1)], beyond)
        result: np.ndarray = chunks * self.samples + inside - self.shift
        return result

    def spans(self, first: int, stop: int) -> Iterator[Range]:
        """The run's samples first..stop-1 as ranges [first, stop) in the order without a skip list."""
        while first < stop:
            place, inside = divmod(first - self.first_sample, self.samples)
            start = self.chunk_at(place) * self.samples + inside - self.shift
            length = min(stop - first, self.samples - inside)
            yield start, start + length
            first += length


def chunk_order(data: DataConfig, steps: int, global_batch_size: int) -> ChunkOrder:
    """The chunks of a run of `steps` steps with its skip list. data.chunks divides the steps; Recipe has checked it.

    Chunks that were begun before the data section keep their places; the others follow, deferred ones last.
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
    """Which samples a step reads. A sample has a number in the run and one in the stream of its data section.

    first_step, first_sample: where the section begins. base_sample: the run's number of the stream's sample 0. pieces:
    samples that a row of the datasets is cut into; the stream's sample n is piece n mod pieces of its row n div pieces.
    """

    global_batch_size: int
    first_step: int = 0
    first_sample: int = 0
    base_sample: int = 0
    chunks: ChunkOrder | None = None
    pieces: int = 1

    def sample(self, step: int) -> int:
        """The number in the run of the first sample of step `step`, from 0. ValueError for one before the section."""
        if step < self.first_step:
            raise ValueError(
                f"step {step} lies before step {self.first_step}, where this data section begins (data.continues)"
            )
        return self.first_sample + (step - self.first_step) * self.global_batch_size

    def chunk_at(self, step: int) -> int | None:
        """The chunk that the batch of `step` belongs to, if the run has chunks."""
        chunks = self.chunks
        return None if chunks is None else chunks.chunk_at((self.sample(step) - chunks.first_sample) // chunks.samples)

    def numbers(self, samples: np.ndarray) -> np.ndarray:
        """int64 [n] numbers in the run -> in the stream."""
        return samples - self.base_sample if self.chunks is None else self.chunks.renumber(samples)

    def spans(self, first: int, stop: int) -> Iterator[Range]:
        """The run's samples first..stop-1 as ranges [first, stop) of the stream, in reading order."""
        if self.chunks is None:
            yield first - self.base_sample, stop - self.base_sample
        else:
            yield from self.chunks.spans(first, stop)

    def read_chunks(self, step: int) -> tuple[int, ...]:
        """The run's chunks that were begun before `step`, in reading order."""
        if self.chunks is None:
            return ()
        places = -(-(self.sample(step) - self.chunks.first_sample) // self.chunks.samples)
        return tuple(self.chunks.chunk_at(place) for place in range(places))

    def front(self, step: int) -> tuple[int, int]:
        """The chunk, and the sample within it, after everything read before `step`; the run has chunks."""
        assert self.chunks is not None
        within_chunk = (self.sample(step) - self.chunks.first_sample) % self.chunks.samples
        read = self.read_chunks(step)
        last = max(read, default=-1)
        return (last, within_chunk) if within_chunk and read[-1] == last else (last + 1, 0)

    def next_row(self, step: int) -> int:
        """The stream's row after everything read before `step`, which ends with a whole one."""
        if self.chunks is None:
            return (self.sample(step) - self.base_sample) // self.pieces
        chunk, within_chunk = self.front(step)
        return (chunk * self.chunks.samples + within_chunk - self.chunks.shift) // self.pieces

    def counts(self, mixture: SampleOrder, step: int) -> list[int]:
        """How many rows of each source the stream gives before `step`."""
        return row_counts(mixture, self.chunks, self.sample(step), self.base_sample, self.pieces)


def timeline(data: DataConfig, steps: int | None, global_batch_size: int) -> Timeline:
    """Of a recipe's data section. steps: of the run, where it has chunks."""
    chunks = None if data.chunks is None or steps is None else chunk_order(data, steps, global_batch_size)
    if data.continues is None:
        return Timeline(global_batch_size, chunks=chunks, pieces=data.pieces)
    begun = data.continues
    return Timeline(global_batch_size, begun.step, begun.sample, begun.base_sample, chunks, data.pieces)


def row_counts(
    mixture: SampleOrder, chunks: ChunkOrder | None, samples: int, first: int = 0, pieces: int = 1
) -> list[int]:
    """How many rows of each source a run's samples first..samples-1 are, its skipped chunks considered. first: where
    the stream begins. pieces: samples of a row.
    """
    if chunks is None:
        return mixture.counts((samples - first) // pieces)
    totals: list[int] = [0] * len(mixture.counts(0))
    for start, stop in chunks.spans(first, samples):
        for index, (low, high) in enumerate(
            zip(mixture.counts(start // pieces), mixture.counts(stop // pieces), strict=True)
        ):
            totals[index] += high - low
    return totals
