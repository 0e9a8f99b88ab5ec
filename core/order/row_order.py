"""The order of a source's rows: a keyed permutation of each epoch's rows, or of each chunk's.

The order is not stored. The row of sample k is computed from k, the seed, a few numbers for each epoch and chunk, and
the places of skipped rows (core/order/row_selection.py): a set of 10^12 rows takes no more memory than one of ten, and
a position is one integer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TypeVar

import numpy as np

from weftrain.core.order import feistel
from weftrain.core.order.row_selection import KeptPlaces, Range, count_before, kept_places, within

_Number = TypeVar("_Number", int, np.ndarray)


@dataclass(frozen=True)
class RowRange:
    """Rows first..first + count - 1 of a set: those of one epoch, or of one of its chunks. Permuted as a whole."""

    first: int
    count: int
    epoch: int
    chunk: int | None


@dataclass(frozen=True)
class RowOrder:
    """The order of a source's rows: its row ranges one after the other, cyclically, permuted anew in each pass.

    skipped: sorted, separate ranges [first, stop) of rows that are left out; their places are stepped over, so skipping
    moves no other row. sequential: rows in stored order. A *pass* (number `turn`) is all row ranges once; a *place* is
    an index within a pass, skipped rows included.
    """

    seed: int
    name: str
    row_ranges: tuple[RowRange, ...]
    skipped: tuple[Range, ...] = ()
    sequential: bool = False

    @cached_property
    def _left_out(self) -> tuple[tuple[Range, ...], ...]:
        """For each row range: its skipped rows as ranges, counted from its first row."""
        return tuple(within(self.skipped, range_.first, range_.first + range_.count) for range_ in self.row_ranges)

    @cached_property
    def _ends(self) -> list[int]:
        """Kept rows of a pass up to the end of each row range."""
        left_out = [sum(stop - first for first, stop in ranges) for ranges in self._left_out]
        return list(accumulate(range_.count - count for range_, count in zip(self.row_ranges, left_out, strict=True)))

    @property
    def num_rows(self) -> int:
        """Rows of a pass without the skipped ones."""
        return self._ends[-1]

    @cached_property
    def num_places(self) -> int:
        """Rows of a pass with the skipped ones."""
        return sum(range_.count for range_ in self.row_ranges)

    @cached_property
    def num_epochs(self) -> int:
        return 1 + max(range_.epoch for range_ in self.row_ranges)

    def rows(self, k: np.ndarray) -> np.ndarray:
        """int64 [n], sample indices within the source -> row numbers of the set, [n]."""
        if not len(k):
            return np.empty(0, dtype=np.int64)
        low, high = int(k.min()), int(k.max())
        turn, within_pass = divmod(low, self.num_rows)
        number = bisect_right(self._ends, within_pass)
        if high - low < self._ends[number] - within_pass:  # nearly always: all in one row range of one pass
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
        """int64 [n], indices among a row range's kept rows in pass `turn` -> row numbers of the set, [n]."""
        range_ = self.row_ranges[number]
        if self._left_out[number]:
            kept = self._kept(turn, number).places(kept)
        return range_.first + (
            kept if self.sequential else feistel.lookup(kept, range_.count, self._row_key(turn, range_))
        )

    def place(self, k: int) -> tuple[int, int]:
        """The pass of the source's sample k, from 0, and its place there."""
        turn, within_pass = divmod(k, self.num_rows)
        number = bisect_right(self._ends, within_pass)
        local = within_pass - self._start(number)
        if self._left_out[number]:
            local = int(self._kept(turn, number).places(np.array([local]))[0])
        return turn, sum(range_.count for range_ in self.row_ranges[:number]) + local

    def samples_before(self, turn: int, place: int) -> int:
        """The number of samples before `place` of pass `turn`: the index of the first kept row from there on."""
        count = turn * self.num_rows
        for number, range_ in enumerate(self.row_ranges):
            local = min(place, range_.count)
            count += self._kept(turn, number).before(local) if self._left_out[number] and local < range_.count else 0
            if local == range_.count:
                count += self._ends[number] - self._start(number)
            elif not self._left_out[number]:
                count += local
            place -= local
        return count

    def num_passed(self, ranges: Sequence[Range], turn: int, place: int) -> int:
        """How many rows of `ranges` come before `place` in pass `turn`."""
        count = 0
        for range_ in self.row_ranges:
            if place <= 0:
                break
            inside = within(ranges, range_.first, range_.first + range_.count)
            if place >= range_.count:
                count += sum(stop - first for first, stop in inside)
            else:
                count += count_before(
                    place, inside, range_.count, None if self.sequential else self._row_key(turn, range_)
                )
            place -= range_.count
        return count

    def epoch(self, k: int) -> int:
        """How often the document of sample k was read before."""
        turn, within_pass = divmod(k, self.num_rows)
        return turn * self.num_epochs + self.row_ranges[bisect_right(self._ends, within_pass)].epoch

    def chunk(self, k: int) -> int | None:
        """The dataset's chunk that sample k belongs to, if the dataset has chunks."""
        return self.row_ranges[bisect_right(self._ends, k % self.num_rows)].chunk

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def _kept(self, turn: int, number: int) -> KeptPlaces:
        range_ = self.row_ranges[number]
        return kept_places(
            range_.count, None if self.sequential else self._row_key(turn, range_), self._left_out[number]
        )

    def _row_key(self, turn: int, range_: RowRange) -> bytes:
        return _row_key(self.seed, self.name, turn * self.num_epochs + range_.epoch, range_.chunk)


@dataclass(frozen=True)
class ResumedOrder:
    """A source's order resumed within a pass: the rest of pass `turn` of `current` from place `at` on, then the passes
    of `then`. The two differ if the source's subset has changed since that pass began. k counts from the resumption.
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


def row_ranges(epochs: Sequence[tuple[int, int]], chunk_rows: int | None, first_epoch: int = 0) -> tuple[RowRange, ...]:
    """The row ranges of epochs given as (first row, rows), cut at the ends of the dataset's chunks, if any."""
    result = []
    for epoch, (first, count) in enumerate(epochs, first_epoch):
        if chunk_rows is None:
            result.append(RowRange(first, count, epoch, None))
            continue
        for chunk in range(first // chunk_rows, -(-(first + count) // chunk_rows)):
            low, high = max(first, chunk * chunk_rows), min(first + count, (chunk + 1) * chunk_rows)
            result.append(RowRange(low, high - low, epoch, chunk))
    return tuple(result)
