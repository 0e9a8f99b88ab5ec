"""Which source each sample is of: by counts that follow the weights exactly, or in the Model Zoo's order.

Weights are met by count, not on average: after each block of samples every source has its share of all samples so far,
rounded up or down by largest remainder. Only the order within a block is random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.order import feistel
from weftrain.core.order.data_section import SourceConfig

MIXTURE_BLOCK = 4096
MAX_MIXTURE_BLOCK = 1 << 20


class SampleOrder(Protocol):
    """Which source each sample is of."""

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] sample numbers -> source index [n], and the sample's index k within that source [n], from 0."""

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` are of each source."""

    def next_k(self, samples: int) -> list[int]:
        """The k of each source's next sample after the first `samples`."""


@dataclass(frozen=True)
class Mixture:
    """Which source each sample is of. shares: positive integers, in the proportions of the weights. block: samples that
    share a table.
    """

    shares: tuple[int, ...]
    block: int
    key: bytes

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See SampleOrder."""
        if len(self.shares) == 1:
            return np.zeros(len(samples), dtype=np.int64), samples
        source, k = np.empty(len(samples), dtype=np.int64), np.empty(len(samples), dtype=np.int64)
        blocks = samples // self.block
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            sources, ks = _mixture_table(self, block)
            at = samples[chosen] - block * self.block
            source[chosen], k[chosen] = sources[at], ks[at]
        return source, k

    def counts(self, samples: int) -> list[int]:
        """See SampleOrder."""
        if len(self.shares) == 1:
            return [samples]
        block, rest = divmod(samples, self.block)
        within = np.bincount(_mixture_table(self, block)[0][:rest], minlength=len(self.shares))
        return [int(count) for count in within + np.array(largest_remainder(self.shares, block * self.block))]

    def next_k(self, samples: int) -> list[int]:
        """See SampleOrder."""
        return self.counts(samples)


def largest_remainder(shares: tuple[int, ...], total: int) -> list[int]:
    """`total` split in the proportions of `shares`: each exact quota rounded down or up (Hamilton's method)."""
    whole = sum(shares)
    quotas = [divmod(total * share, whole) for share in shares]
    parts = [quotient for quotient, _ in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda index: (-quotas[index][1], index))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


@lru_cache(maxsize=8)
def _mixture_table(mixture: Mixture, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Source int32 [block] and k int64 [block] of a block's samples: its counts laid out, then permuted."""
    before = largest_remainder(mixture.shares, block * mixture.block)
    after = largest_remainder(mixture.shares, (block + 1) * mixture.block)
    counts = [high - low for low, high in zip(before, after, strict=True)]
    laid_out = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    key = feistel.derive_key(mixture.key.hex(), block)
    source = laid_out[feistel.permute(np.arange(mixture.block), mixture.block, key)]
    k = np.empty(mixture.block, dtype=np.int64)
    k[np.argsort(source, kind="stable")] = np.concatenate(
        [np.arange(low, high) for low, high in zip(before, after, strict=True)]
    )
    return source, k


def source_shares(sources: Sequence[SourceConfig], rows: Sequence[int] | None = None) -> list[Fraction]:
    """The exact shares of a recipe's sources: their weights, their tokens, or epochs times `rows`. Raises DataError.

    rows: of each source; only shares in epochs need them.
    """
    if sources[0].weight is not None:
        return [Fraction(repr(source.weight)) for source in sources]
    if sources[0].tokens is not None:
        return [Fraction(source.tokens or 0) for source in sources]
    if rows is None:
        raise DataError("data.sources: shares in epochs follow from the datasets' sizes: prepare the datasets first")
    return [Fraction(repr(source.epochs)) * count for source, count in zip(sources, rows, strict=True)]


def make_mixture(sources: tuple[SourceConfig, ...], seed: int, rows: Sequence[int] | None = None) -> Mixture:
    """The mixture of a recipe's sources. rows: see source_shares. Raises DataError for a share below 2^-20.

    A block holds at least one sample of each source, so that no source's count ever falls at a block's end.
    """
    weights = source_shares(sources, rows)
    unit = Fraction(
        math.gcd(*(weight.numerator for weight in weights)), math.lcm(*(weight.denominator for weight in weights))
    )
    shares = tuple(int(weight / unit) for weight in weights)
    smallest = min(shares)
    block = max(MIXTURE_BLOCK, 1 << (-(-sum(shares) // smallest) - 1).bit_length())
    if block > MAX_MIXTURE_BLOCK:
        name = sources[shares.index(smallest)].name
        raise DataError(
            f"data.sources: the share of '{name}' is below 1/{MAX_MIXTURE_BLOCK:,} of all: raise it, or leave the "
            "source out"
        )
    return Mixture(shares, block, feistel.derive_key("mixture", seed, *(source.name for source in sources)))


@dataclass(frozen=True)
class CerebrasOrder:
    """The order of Cerebras' Model Zoo for a mixture with `shuffle: false` (its `Mixture` with `interleave`).

    As in its data/common/h5_map_dataset/readers.py, release 2.x: weights are normalised; an epoch has max(rows /
    weight) samples over the components of more than 5 %; a component gives int(epoch x weight) of them, its rows in
    order and cyclically; numpy's default_rng(seed) shuffles the components. Every epoch is the same, and `sample mod
    epoch` is the position in it. As there, the whole order is a table in memory, of 10 bytes a sample.
    """

    weights: tuple[float, ...]
    rows: tuple[int, ...]
    seed: int

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See SampleOrder. k restarts at 0 in each epoch."""
        component, k = _cerebras_table(self)
        place = samples % len(component)
        return component[place].astype(np.int64), k[place]

    def counts(self, samples: int) -> list[int]:
        component, _ = _cerebras_table(self)
        epochs, rest = divmod(samples, len(component))
        whole = np.bincount(component, minlength=len(self.rows))
        return [int(count) for count in epochs * whole + np.bincount(component[:rest], minlength=len(self.rows))]

    def next_k(self, samples: int) -> list[int]:
        """See SampleOrder. k restarts at 0 in each epoch."""
        component, _ = _cerebras_table(self)
        return [int(count) for count in np.bincount(component[: samples % len(component)], minlength=len(self.rows))]


@lru_cache(maxsize=2)
def _cerebras_table(order: CerebrasOrder) -> tuple[np.ndarray, np.ndarray]:
    """Source uint16 [epoch] and k int64 [epoch] of each sample."""
    total_weight = sum(order.weights)
    weights = [weight / total_weight for weight in order.weights]
    epoch = max(rows / weight for rows, weight in zip(order.rows, weights, strict=True) if weight > 0.05)
    counts = [int(epoch * weight) for weight in weights]
    indices = np.arange(sum(counts))
    np.random.default_rng(order.seed).shuffle(indices)
    component = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)[indices]
    k = np.empty(len(component), dtype=np.int64)
    k[np.argsort(component, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return component, k
