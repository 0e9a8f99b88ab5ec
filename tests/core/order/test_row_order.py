"""The order of rows: exact epochs, chunks that are ranges of samples, and the same rows in every process."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle  # what a reader process is handed
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_configs import config
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.order import feistel
from weftrain.core.order.mixture import make_mixture
from weftrain.core.order.row_order import RowOrder, row_ranges
from weftrain.core.order.timeline import chunk_order


@st.composite
def orders(draw: st.DrawFn) -> tuple[RowOrder, list[tuple[int, int]]]:
    """An order of up to three epochs, and its epochs (first row, rows)."""
    epochs, first = [], draw(st.integers(0, 5))
    for count in draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)):
        epochs.append((first, count))
        first += count
    chunk_rows = draw(st.none() | st.integers(1, 15))
    edges = sorted(draw(st.sets(st.integers(0, first), max_size=6)))
    skipped = tuple(zip(edges[::2], edges[1::2], strict=False))
    order = RowOrder(draw(st.integers(0, 9)), "source", row_ranges(epochs, chunk_rows), skipped)
    return order, epochs


@pytest.mark.prove
@settings(deadline=None, max_examples=150)
@given(orders(), st.integers(0, 3))
def test_each_epoch_has_each_kept_row_once_and_no_skipped_one(
    drawn: tuple[RowOrder, list[tuple[int, int]]], turn: int
) -> None:
    order, epochs = drawn
    skipped = {row for low, high in order.skipped for row in range(low, high)}
    kept = [[row for row in range(first, first + count) if row not in skipped] for first, count in epochs]
    if not sum(map(len, kept)):
        return
    assert order.num_rows == sum(map(len, kept))
    k = np.arange(turn * order.num_rows, (turn + 1) * order.num_rows)
    rows = order.rows(k)
    start = 0
    for epoch, expected in enumerate(kept):
        part = rows[start : start + len(expected)]
        assert sorted(part.tolist()) == expected
        if len(expected):
            assert order.epoch(int(k[start])) == turn * order.num_epochs + epoch
        start += len(expected)
    alone = [int(order.rows(np.array([number]))[0]) for number in k]
    assert alone == rows.tolist()


def digest(numbers: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(numbers, dtype="<i8").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("order", "samples", "expected"),
    [
        (RowOrder(1, "a", row_ranges([(0, 1000)], None)), 3500, "eb7a28c90ab03835"),
        (RowOrder(1, "a", row_ranges([(0, 500), (500, 700)], None)), 3000, "be5b04e4dd6335d8"),
        (RowOrder(2, "b", row_ranges([(0, 60), (60, 60)], 20)), 300, "0aa08abc9ee8f296"),
        (RowOrder(2, "b", row_ranges([(10, 40)], None)), 300, "92f4fab87fff3b1c"),
    ],
)
def test_the_order_without_skipped_rows_is_pinned(order: RowOrder, samples: int, expected: str) -> None:
    """Recorded runs read by it: one epoch, two, chunks, a subset."""
    assert digest(order.rows(np.arange(samples))) == expected


def test_chunks_are_ranges_of_samples() -> None:
    order = RowOrder(3, "source", row_ranges([(0, 60)], 20))
    for epoch in range(2):
        for chunk in range(3):
            k = epoch * 60 + chunk * 20 + np.arange(20)
            assert sorted(order.rows(k).tolist()) == list(range(chunk * 20, chunk * 20 + 20))
            assert order.chunk(int(k[0])) == order.chunk(int(k[-1])) == chunk
    assert not np.array_equal(order.rows(np.arange(20)), order.rows(60 + np.arange(20)))
    assert order.rows(np.arange(20)).tolist() != (order.rows(20 + np.arange(20)) - 20).tolist()


def test_memory_does_not_grow_with_the_rows() -> None:
    """10^12 rows, and samples far into them, in less than a megabyte."""
    order = RowOrder(0, "source", row_ranges([(0, 10**12)], None), ((5, 9), (10**9, 10**9 + 7)))
    tracemalloc.start()
    rows = order.rows(np.arange(10**11, 10**11 + 64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert len(np.unique(rows)) == 64


def test_far_into_a_run_costs_what_the_beginning_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in permuted blocks, not in time."""
    calls = 0
    permute = feistel.permute

    def counted(*arguments: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        return permute(*arguments)

    monkeypatch.setattr(feistel, "permute", counted)
    order = RowOrder(1, "counted", row_ranges([(0, 10**12)], None))
    costs = []
    for start in (0, 10**9 // 4096 * 4096):
        calls = 0
        order.rows(np.arange(start, start + 64))
        costs.append(calls)
    assert costs == [1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_the_permutation_is_uniform_and_uncorrelated(seed: int) -> None:
    """Over 2^16 + 3 rows: images of a sixteenth of the indices fall evenly into 64 bins (chi-squared, 63 degrees, six
    standard deviations), neighbours' images are uncorrelated, and so are two epochs' (|r| < 6 / sqrt(n)).
    """
    size = (1 << 16) + 3
    first, second = (
        feistel.permute(np.arange(size), size, feistel.derive_key("rows", seed, "x", epoch)) for epoch in (0, 1)
    )
    for part in np.array_split(first, 16):
        counts = np.bincount(part * 64 // size, minlength=64)
        expected = len(part) / 64
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * np.sqrt(2 * 63)
    for lag in (1, 2, 7, 64, 4096):
        assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < 6 / np.sqrt(size)
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / np.sqrt(size)
    assert (first == second).sum() < 12  # one is expected


# -- any number of readers


def _read(arguments: tuple[bytes, int, int, int]) -> np.ndarray:
    data, step, first, count = arguments
    return np.asarray(pickle.loads(data).rows(np.arange(step * 24 + first, step * 24 + first + count)))


@pytest.mark.parametrize("readers", [1, 4])
def test_other_processes_compute_the_same_rows(readers: int, tmp_path: Path) -> None:
    order = RowOrder(1, "source", row_ranges([(0, 5000)], 500), ((7, 90),))
    expected = order.rows(np.arange(24 * 6))
    data = pickle.dumps(order)
    with multiprocessing.get_context("fork").Pool(readers) as pool:
        parts = pool.map(
            _read, [(data, step, first, 24 // readers) for step in range(6) for first in range(0, 24, 24 // readers)]
        )
    assert np.array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_any_number_of_ranks_reads_the_same_stream(ranks: int) -> None:
    data = config(chunks=4, skip=[{"chunk": 1, "action": "defer", "reason": "x"}])
    mixture, chunks = make_mixture(data.sources, 1), chunk_order(data, 40, 24)
    whole = mixture.locate(chunks.renumber(np.arange(40 * 24)))
    share = 24 // ranks
    parts = [
        mixture.locate(chunks.renumber(np.arange(step * 24 + rank * share, step * 24 + (rank + 1) * share)))
        for step in range(40)
        for rank in range(ranks)
    ]
    for index in (0, 1):
        assert np.array_equal(np.concatenate([part[index] for part in parts]), whole[index])
