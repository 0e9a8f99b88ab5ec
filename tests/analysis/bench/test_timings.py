"""Percentiles, warm-up, intervals and verdicts on step times that are made up, so that what is true is known."""

from __future__ import annotations

import numpy as np
import pytest

from weftrain.analysis.bench.timings import difference, median_interval, percentile, warm_up_steps


def steps(seed: int, count: int = 40, level: float = 100.0, noise: float = 0.02, between: float = 0.005) -> list[float]:
    """A round: noise within it, and a level of its own as another process would have."""
    generator = np.random.default_rng(seed)
    return list(level * np.exp(generator.normal(0, between) + generator.normal(0, noise, count)))


@pytest.mark.parametrize(
    ("first", "wanted"), [([4000.0], 1), ([4000.0, 900.0, 300.0], 3), ([4000.0, 140.0, 141.0, 139.0, 142.0], 5)]
)
def test_the_warm_up_ends_where_the_level_changes(first: list[float], wanted: int) -> None:
    assert warm_up_steps([*first, *steps(1)]) == wanted


def test_noise_is_no_warm_up() -> None:
    found = [warm_up_steps(steps(seed)) for seed in range(40)]
    assert found.count(1) >= 34
    assert warm_up_steps([5.0, 1.0, 1.0]) == 1
    assert warm_up_steps([5.0]) == 0


def test_percentiles_by_hand() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([10.0, 20.0], 0.9) == 19.0


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Of 60 samples of a known median, a 95 % interval may miss a few."""
    found = [median_interval([steps(seed, between=0.0)]) for seed in range(60)]
    assert sum(interval.low <= 100.0 <= interval.high for interval in found) >= 51
    assert all(interval.high - interval.low < 3 for interval in found)


def test_a_planted_slowdown_of_three_percent_is_found() -> None:
    for seed in range(10):
        a = [steps(1000 + 10 * seed + number) for number in range(6)]
        b = [steps(2000 + 10 * seed + number, level=103.0) for number in range(6)]
        found = difference(a, b)
        assert found.ratio == pytest.approx(1.03, abs=0.012)
        assert found.low > 1, found
        assert found.verdict.startswith("B is slower by")
        assert difference(b, a).verdict.startswith("B is faster by")


@pytest.mark.prove
def test_two_runs_of_the_same_agree() -> None:
    """One in twenty may not."""
    verdicts = [
        difference([steps(10 * seed + n) for n in range(5)], [steps(5000 + 10 * seed + n) for n in range(5)]).verdict
        for seed in range(40)
    ]
    assert sum(verdict.startswith("no difference") for verdict in verdicts) >= 35


def test_one_round_says_what_it_cannot_know() -> None:
    assert "of one round each" in difference([steps(1)], [steps(2)]).verdict
