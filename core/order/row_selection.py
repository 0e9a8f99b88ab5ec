"""Permutations with rows left out: from the j-th kept row to its place in the permutation, and back.

All rows are permuted and the places of those left out are stepped over, so leaving a row out moves no other. Memory: 8
bytes for each row left out, up to 2^20 of them; beyond that 8 bytes for each block of 4096 rows. Time: 60 ns for each
row left out, once a permutation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from weftrain.core.order import feistel

MAX_LISTED = 1 << 20  # places that are listed one by one
_BATCH = 1 << 18
Range = tuple[int, int]  # [first, stop)


@dataclass(frozen=True)
class KeptPlaces:
    """The places that a permutation of 0..size-1 keeps without the rows in `left_out` (sorted ranges).

    key: the permutation's; None: rows in stored order. listed: the places left out, sorted; if it is None,
    `kept_before` counts the kept places before each block.
    """

    size: int
    key: bytes | None
    left_out: tuple[Range, ...]
    listed: np.ndarray | None
    kept_before: np.ndarray | None

    def places(self, j: np.ndarray) -> np.ndarray:
        """int64 [n], indices among the kept rows in permuted order -> their places, [n]."""
        if self.listed is not None:
            result: np.ndarray = j + np.searchsorted(self.listed - np.arange(len(self.listed)), j, side="right")
            return result
        assert self.kept_before is not None
        blocks = np.searchsorted(self.kept_before, j, side="right") - 1
        places = np.empty(j.shape, dtype=np.int64)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            kept = np.flatnonzero(self._kept_in(block))
            places[chosen] = block * feistel.BLOCK + kept[j[chosen] - self.kept_before[block]]
        return places

    def before(self, place: int) -> int:
        """How many kept rows come before `place`, which may be `size`."""
        if self.listed is not None:
            return place - int(np.searchsorted(self.listed, place))
        assert self.kept_before is not None
        block, within = divmod(place, feistel.BLOCK)
        return int(self.kept_before[block]) + (int(self._kept_in(block)[:within].sum()) if within else 0)

    def _kept_in(self, block: int) -> np.ndarray:
        start = block * feistel.BLOCK
        places = np.arange(start, min(start + feistel.BLOCK, self.size), dtype=np.int64)
        rows = places if self.key is None else feistel.lookup(places, self.size, self.key)
        edges = np.array(self.left_out, dtype=np.int64).reshape(-1)
        kept: np.ndarray = np.searchsorted(edges, rows, side="right") % 2 == 0
        return kept


@lru_cache(maxsize=8)  # at most 8 MiB each up to 2^32 rows
def kept_places(size: int, key: bytes | None, left_out: tuple[Range, ...]) -> KeptPlaces:
    """The kept places of one permutation. left_out: sorted ranges within 0..size that do not touch."""
    count = sum(stop - first for first, stop in left_out)
    if count <= MAX_LISTED:
        listed = np.concatenate([*_places_of(left_out, size, key), np.empty(0, dtype=np.int64)])
        listed.sort()
        return KeptPlaces(size, key, left_out, listed, None)
    missing = np.zeros(-(-size // feistel.BLOCK), dtype=np.int64)
    for places in _places_of(left_out, size, key):
        missing += np.bincount(places // feistel.BLOCK, minlength=len(missing))
    sizes = np.full(len(missing), feistel.BLOCK, dtype=np.int64)
    sizes[-1] = size - (len(missing) - 1) * feistel.BLOCK
    return KeptPlaces(
        size, key, left_out, None, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes - missing)])
    )


def count_before(place: int, ranges: Sequence[Range], size: int, key: bytes | None) -> int:
    """How many rows of `ranges` come before `place` in the permutation."""
    return sum(int((places < place).sum()) for places in _places_of(ranges, size, key))


def _places_of(ranges: Sequence[Range], size: int, key: bytes | None) -> Iterator[np.ndarray]:
    for first, stop in ranges:
        for start in range(first, stop, _BATCH):
            rows = np.arange(start, min(start + _BATCH, stop), dtype=np.int64)
            yield rows if key is None else feistel.invert(rows, size, key)


def merged(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The same rows as sorted, non-empty ranges that neither overlap nor touch."""
    result: list[Range] = []
    for first, stop in sorted(ranges):
        if first == stop:
            continue
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((first, stop))
    return tuple(result)


def without(ranges: Sequence[Range], removed: Sequence[Range]) -> tuple[Range, ...]:
    """The rows of `ranges` that are not in `removed`, merged."""
    result = []
    for first, stop in merged(ranges):
        for low, high in merged(removed):
            if high <= first or low >= stop:
                continue
            if first < low:
                result.append((first, low))
            first = max(first, high)
        if first < stop:
            result.append((first, stop))
    return tuple(result)


def within(ranges: Sequence[Range], first: int, stop: int) -> tuple[Range, ...]:
    """The part of `ranges` that lies in first..stop-1, counted from `first`."""
    return merged(
        [(max(low, first) - first, min(high, stop) - first) for low, high in ranges if low < stop and high > first]
    )
