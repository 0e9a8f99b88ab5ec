"""The order of rows: exact epochs, chunks that are ranges of samples, rows and chunks that are skipped, the Model Zoo's
order.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle  # what a reader process is handed
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.order import feistel, row_selection
from weftrain.core.order.data_section import DataConfig
from weftrain.core.order.mixture import CerebrasOrder, make_mixture
from weftrain.core.order.row_order import RowOrder, row_ranges
from weftrain.core.order.timeline import ChunkOrder, chunk_order, sample_counts


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


def test_a_skipped_row_moves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the places left out are counted by blocks instead of listed."""
    plain = RowOrder(1, "source", row_ranges([(3, 9000), (9003, 5000)], None))
    skipped = RowOrder(1, "source", plain.row_ranges, ((0, 17), (40, 6000), (10_000, 13_001)))
    kept = [
        row
        for row in plain.rows(np.arange(28_000)).tolist()
        if not any(low <= row < high for low, high in skipped.skipped)
    ]
    k = np.arange(2 * skipped.num_rows)
    assert skipped.rows(k).tolist() == kept
    places = [skipped.place(number) for number in range(0, 6000, 499)]
    counts = [skipped.samples_before(turn, place) for turn, place in places]
    passed = skipped.num_passed(skipped.skipped, 0, 12_000)
    assert counts == list(range(0, 6000, 499))
    monkeypatch.setattr(row_selection, "MAX_LISTED", 10)
    row_selection.kept_places.cache_clear()
    assert skipped.rows(k).tolist() == kept
    assert [skipped.place(number) for number in range(0, 6000, 499)] == places
    assert [skipped.samples_before(turn, place) for turn, place in places] == counts
    assert skipped.num_passed(skipped.skipped, 0, 12_000) == passed == 12_000 - skipped.samples_before(0, 12_000)
    row_selection.kept_places.cache_clear()


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


# -- chunks of a run


def config(**changes: Any) -> DataConfig:
    sources = [{"name": "a", "path": "a", "weight": 0.75}, {"name": "b", "path": "b", "weight": 0.25}]
    return DataConfig.model_validate({"sequence_length": 8, "shuffle_seed": 1, "sources": sources} | changes)


def test_deferred_chunks_come_last_and_dropped_ones_make_room() -> None:
    skip = [
        {"chunk": 1, "action": "defer", "reason": "loss spike"},
        {"chunk": 3, "action": "drop", "reason": "poisoned"},
    ]
    order = chunk_order(config(chunks=5, skip=skip), 50, 4)  # a chunk is 10 steps of 4
    assert order == ChunkOrder(5, 40, (0, 2, 4, 1))
    assert [order.chunk_at(place) for place in range(7)] == [0, 2, 4, 1, 5, 6, 7]
    renumbered = order.renumber(np.arange(280))
    assert renumbered.tolist() == [chunk * 40 + within for chunk in (0, 2, 4, 1, 5, 6, 7) for within in range(40)]
    none = chunk_order(config(chunks=5), 50, 4)
    assert none.renumber(np.arange(280)).tolist() == list(range(280))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1200), st.permutations(range(4)), st.integers(0, 2))
def test_counts_are_what_is_read(samples: int, order: list[int], dropped: int) -> None:
    data = config()
    mixture = make_mixture(data.sources, 1)
    chunks = ChunkOrder(4, 250, tuple(order[dropped:]))
    source, _ = mixture.locate(chunks.renumber(np.arange(samples)))
    assert sample_counts(mixture, chunks, samples) == [int((source == index).sum()) for index in (0, 1)]


# -- the Model Zoo's order


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


# -- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [{"name": "a", "path": "a", "weight": 0.5}]}, "weights add up to 0.5, not to 1"),
        (
            {"sources": [{"name": "a", "path": "a", "weight": 0.5}, {"name": "b", "path": "b", "tokens": 5}]},
            "different kinds",
        ),
        (
            {"sources": [{"name": "a", "path": "a", "weight": 1.0, "epochs": 2.0}]},
            "exactly one of 'weight', 'tokens' and 'epochs'",
        ),
        ({"sources": [{"name": "a", "path": "a"}]}, "exactly one of 'weight', 'tokens' and 'epochs'"),
        ({"skip": [{"chunk": 0, "action": "drop", "reason": "x"}]}, "there is no chunk 0 of none"),
        ({"chunks": 2, "skip": [{"chunk": 2, "action": "drop", "reason": "x"}]}, "there is no chunk 2 of 2"),
        ({"chunks": 4, "skip": [{"chunk": 2, "action": "drop", "reason": "x"}] * 2}, "two entries name chunk 2"),
        ({"chunks": 1, "skip": [{"chunk": 0, "action": "drop", "reason": "x"}]}, "every chunk is dropped"),
        ({"skip": [{"chunk": 0, "reason": "x"}]}, "give 'chunk' and 'action', or 'source' and 'rows'"),
        ({"skip": [{"source": "a", "reason": "x"}]}, "give 'chunk' and 'action', or 'source' and 'rows'"),
        ({"skip": [{"source": "a", "rows": [4, 4], "reason": "x"}]}, "are none"),
        ({"skip": [{"source": "z", "rows": [0, 4], "reason": "x"}]}, "there is no source 'z'"),
        (
            {"skip": [{"source": "a", "rows": rows, "reason": "x"} for rows in ([0, 4], [3, 5])]},
            "two entries name row 3 of source 'a'",
        ),
        ({"sources": [], "synthetic_rows": 4, "chunks": 2}, "synthetic rows have no"),
    ],
)
def test_what_a_recipe_cannot_say(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)


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
