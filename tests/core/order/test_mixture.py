"""Which source each sample belongs to: exact counts, and the Model Zoo's order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_datasets import config

from weftrain.core.errors import DataError
from weftrain.core.order.mixture import (
    MAX_MIXTURE_BLOCK,
    MIXTURE_BLOCK,
    CerebrasOrder,
    Mixture,
    largest_remainder,
    make_mixture,
)
from weftrain.core.order.row_order import RowOrder, row_ranges


@settings(max_examples=100, deadline=None)
@given(shares=st.lists(st.integers(1, 10**20), min_size=1, max_size=12).map(tuple), total=st.integers(0, 2**62))
def test_largest_remainder_is_exact(shares: tuple[int, ...], total: int) -> None:
    parts, whole = largest_remainder(shares, total), sum(shares)
    assert sum(parts) == total
    assert all(
        part in (total * share // whole, -(-total * share // whole)) for part, share in zip(parts, shares, strict=True)
    )


def test_largest_remainder_gives_to_the_largest() -> None:
    assert largest_remainder((47, 16, 15, 12, 9, 1), 100) == [47, 16, 15, 12, 9, 1]
    assert largest_remainder((53, 24, 23), 10) == [5, 3, 2]  # remainders .3, .4, .3
    assert largest_remainder((1, 1, 1), 2) == [1, 1, 0]  # equal remainders: the first


def mixture_of(*weights: float, seed: int = 0) -> Mixture:
    return make_mixture(
        config(
            Path(), *({"name": str(index), "weight": weight} for index, weight in enumerate(weights)), seed=seed
        ).sources,
        seed,
    )


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 1.0), min_size=2, max_size=8),
    block=st.integers(0, 2**40),
    seed=st.integers(0, 99),
)
def test_counts_keep_within_one_of_the_weights(weights: list[float], block: int, seed: int) -> None:
    mixture = mixture_of(*weights, seed=seed)
    samples = block * mixture.block
    low, high = mixture.counts(samples), mixture.counts(samples + mixture.block)
    assert sum(low) == samples
    for index, share in enumerate(mixture.shares):
        # |count - weight x samples| < 1
        assert abs(low[index] * sum(mixture.shares) - share * samples) < sum(mixture.shares)
        assert high[index] >= low[index]


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), start=st.integers(0, 2**50), seed=st.integers(0, 9)
)
def test_each_source_is_read_in_order_without_gaps(weights: list[float], start: int, seed: int) -> None:
    """From any sample on, the k of each source count up by one from counts(start)."""
    mixture = mixture_of(*weights, seed=seed)
    samples = np.arange(start, start + 2 * MIXTURE_BLOCK + 100)
    source, k = mixture.locate(samples)
    for index, (low, high) in enumerate(zip(mixture.counts(start), mixture.counts(start + len(samples)), strict=True)):
        assert np.array_equal(k[source == index], np.arange(low, high))


def test_a_rare_source_gets_a_larger_block_and_too_rare_a_one_is_refused() -> None:
    assert mixture_of(1, 1).block == MIXTURE_BLOCK
    assert mixture_of(1, 4095).block == MIXTURE_BLOCK
    assert mixture_of(1, 4096).block == 2 * MIXTURE_BLOCK
    with pytest.raises(DataError, match=f"share of '1' is below 1/{MAX_MIXTURE_BLOCK:,}"):
        mixture_of(1, 1e-7)


def test_weights_are_shares() -> None:
    assert mixture_of(0.25, 0.75) == mixture_of(1, 3)
    of_tokens = config(Path(), {"name": "0", "tokens": 10**12}, {"name": "1", "tokens": 3 * 10**12}).sources
    assert make_mixture(of_tokens, 0) == mixture_of(1, 3)
    of_epochs = config(Path(), {"name": "0", "epochs": 2.0}, {"name": "1", "epochs": 0.5}).sources
    assert make_mixture(of_epochs, 0, [100, 1200]) == mixture_of(1, 3)


def test_the_order_within_a_block_is_mixed() -> None:
    source, _ = mixture_of(1, 1).locate(np.arange(MIXTURE_BLOCK))
    runs = 1 + int((np.diff(source) != 0).sum())
    assert abs(runs - MIXTURE_BLOCK / 2) < 200  # a fair order has 2048 runs, give or take 32


def test_the_model_zoos_order() -> None:
    """From the definition: counts by int(epoch x weight), rows in order and again, which comes next by numpy's
    shuffle.
    """
    order = CerebrasOrder((0.7, 0.26, 0.04), (700, 400, 90), seed=5)
    epoch = 400 / 0.26  # b would last longest; c has less than 5 %
    counts = [int(epoch * weight) for weight in (0.7, 0.26, 0.04)]
    component, k = order.locate(np.arange(sum(counts)))
    indices = np.arange(sum(counts))
    np.random.default_rng(5).shuffle(indices)
    assert component.tolist() == [int(np.searchsorted(np.cumsum(counts), index, side="right")) for index in indices]
    for index, count in enumerate(counts):
        assert k[component == index].tolist() == list(range(count))
    again, k_again = order.locate(sum(counts) + np.arange(sum(counts)))
    assert np.array_equal(again, component)
    assert np.array_equal(k_again, k)
    assert order.counts(sum(counts)) == counts
    assert order.counts(1000) == [int((order.locate(np.arange(1000))[0] == index).sum()) for index in range(3)]
    rows = RowOrder(5, "c", row_ranges([(100, 9)], None), sequential=True).rows(k[component == 2])
    assert rows.tolist() == [100 + number % 9 for number in range(counts[2])]


def test_weights_are_normalised_as_there() -> None:
    assert np.array_equal(
        CerebrasOrder((3.0, 1.0), (30, 30), 1).locate(np.arange(40))[0],
        CerebrasOrder((0.75, 0.25), (30, 30), 1).locate(np.arange(40))[0],
    )
