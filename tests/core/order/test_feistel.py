"""The keyed permutation: a bijection at every size, the same whole or in pieces, unbiased, and pinned, since stored
runs depend on it.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.order import feistel


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 20_000), seed=st.integers(0, 2**64))
def test_bijection(size: int, seed: int) -> None:
    images = feistel.permute(np.arange(size), size, feistel.derive_key(seed))
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 8192])
def test_bijection_at_the_edges(size: int) -> None:
    images = feistel.permute(np.arange(size), size, feistel.derive_key("edge"))
    assert np.array_equal(np.sort(images), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 2**62),
    seed=st.integers(0, 99),
    indices=st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=40),
)
def test_any_index_of_any_size_alone_or_together(size: int, seed: int, indices: list[int]) -> None:
    chosen, key = np.array(indices) % size, feistel.derive_key(seed)
    together = feistel.permute(chosen, size, key)
    assert together.min() >= 0
    assert together.max() < size
    assert len(np.unique(together)) == len(np.unique(chosen))
    alone = [int(feistel.permute(np.array([index]), size, key)[0]) for index in chosen]
    assert together.tolist() == alone


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**32))
def test_the_inverse_undoes_it(size: int, seed: int) -> None:
    key, indices = feistel.derive_key("rows", seed), np.arange(size)
    assert np.array_equal(feistel.invert(feistel.permute(indices, size, key), size, key), indices)


def test_lookup_equals_permute_across_blocks() -> None:
    size, key = 3 * feistel.BLOCK + 17, feistel.derive_key("lookup")
    indices = np.random.default_rng(0).integers(0, size, 500)
    assert np.array_equal(feistel.lookup(indices, size, key), feistel.permute(indices, size, key))


def test_keys_differ_by_description() -> None:
    descriptions = [("a", 1), ("a", "1"), ("a1",), ("a", 1, 0), (1, "a"), ("a", 2)]
    keys = [feistel.derive_key(*description) for description in descriptions]
    assert len(set(keys)) == len(keys)
    first, second = (feistel.permute(np.arange(1000), 1000, key) for key in keys[:2])
    assert (first == second).sum() < 10


@pytest.mark.parametrize("size", [3, 8, 100])
def test_every_image_is_equally_likely(size: int) -> None:
    """Chi-squared over 1000 keys: each index goes to each image equally often. Six standard deviations."""
    trials, hits = 1000, np.zeros((size, size))
    for seed in range(trials):
        hits[np.arange(size), feistel.permute(np.arange(size), size, feistel.derive_key(seed))] += 1
    expected, freedom = trials / size, (size - 1) ** 2
    statistic = ((hits - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours() -> None:
    size = 1 << 16
    images = feistel.permute(np.arange(size), size, feistel.derive_key("neighbours"))
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.03
    assert (np.abs(np.diff(images)) == 1).mean() < 1e-3


def test_the_order_is_pinned() -> None:
    """A change here changes the order of every run ever recorded."""
    key = feistel.derive_key("rows", 1, "python_stdlib", 0)
    assert feistel.permute(np.arange(6), 14_067, key).tolist() == [13708, 2481, 8082, 9801, 11154, 8261]
    assert feistel.permute(np.array([0, 2**61]), 2**62, key).tolist() == [1877313788766358631, 2932295831983462690]


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_sizes_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        feistel.permute(np.array([0]), size, feistel.derive_key(0))
