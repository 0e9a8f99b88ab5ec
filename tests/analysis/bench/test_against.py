"""Two programs side by side: losses at the same step only, and a ratio with an interval; on results that are made
up.
"""

from __future__ import annotations

from typing import Any

import pytest

from weftrain.analysis.bench.against import against, check_steps, steps_made
from weftrain.analysis.bench.timings import difference
from weftrain.analysis.bench.train import BenchError


def result(speed: float, curve: list[float], name: str = "ours", **more: Any) -> dict[str, Any]:
    whole = {
        "name": name,
        "tokens_per_second": speed,
        "step_ms": 1e3 / speed,
        "loss_first": curve[0],
        "loss_last": curve[-1],
    }
    return whole | more


TEN = [6.0 - 0.1 * step for step in range(10)]


def test_losses_are_compared_at_the_last_step() -> None:
    losses = against([result(10, TEN, losses=TEN)], [result(10, TEN, "theirs", losses=TEN)]).losses
    assert (losses.step, losses.difference) == (10, 0.0)
    assert (losses.ours, losses.theirs) == (TEN[9], TEN[9])
    assert losses.verdict == ("losses at step 10, the last that both report, differ by at most 0: the same training")
    other = [*TEN[:9], TEN[9] + 0.01]
    assert (
        "NOT the same training"
        in against([result(10, TEN, losses=TEN)], [result(10, other, losses=other)]).losses.verdict
    )


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ({"losses": TEN}, 10),
        ({"last_step": 10}, 10),
        ({"steps": 8, "warm_up_steps": 2}, 10),
        ({"losses": TEN, "last_step": 3}, 10),
        ({"steps": 8}, None),
        ({"steps": "8", "warm_up_steps": 2}, None),
        ({}, None),
    ],
)
def test_steps_that_a_result_says(more: dict[str, Any], made: int | None) -> None:
    assert steps_made(result(10, TEN, **more)) == made


def test_another_number_of_steps_is_refused() -> None:
    """The median of 20 steps holds later, other steps than that of 10, and their last losses are of other steps."""
    twenty = [*TEN, *(5.0 - 0.1 * step for step in range(10))]
    with pytest.raises(BenchError, match="ours made 20 steps and theirs 10: compare the same number: --steps 10"):
        against([result(10, twenty, losses=twenty)], [result(10, TEN, "theirs", losses=TEN)])
    silent = check_steps(result(10, TEN, losses=TEN), result(10, TEN, "theirs"))
    assert silent.startswith("theirs does not say how many steps it made")


def test_a_program_that_tells_two_losses() -> None:
    ours = result(10, TEN, losses=TEN)
    losses = against([ours], [result(10, TEN, "theirs")]).losses
    assert losses.step == 1
    assert (
        "theirs does not report which step its loss_last is of: have it print `losses` or `last_step`" in losses.verdict
    )
    assert losses.verdict.endswith("the same start")
    assert against([ours], [result(10, TEN, "theirs", last_step=10)]).losses.step == 10


def test_a_loss_that_is_not_finite_is_not_the_same() -> None:
    bad = [*TEN[:9], float("nan")]
    rounds = [result(10, TEN, losses=TEN)] * 2
    assert "NOT the same training" in against(rounds, [result(10, bad, losses=bad), rounds[0]]).losses.verdict


def test_the_ratio_is_paired_and_has_the_interval_of_bench_compare() -> None:
    ours = [result(speed, TEN, losses=TEN) for speed in (20.0, 21.0, 19.8)]
    theirs = [result(speed, TEN, "theirs", losses=TEN) for speed in (10.0, 10.4, 10.1)]
    found = against(ours, theirs)
    assert found.ratios == pytest.approx((2.0, 21 / 10.4, 19.8 / 10.1))
    assert found.speed is not None
    same = difference(
        [[1e3 / one["tokens_per_second"]] for one in ours], [[1e3 / one["tokens_per_second"]] for one in theirs]
    )
    assert (found.speed.low, found.speed.high) == (same.low, same.high)
    assert found.speed.low < found.ratio < found.speed.high
    assert found.verdict.startswith("theirs is slower by 100.0% (95 %: +")
    alike = against(ours, [ours[1], ours[0], ours[2]])
    assert alike.verdict.startswith("no difference at 95 %")


def test_one_round_has_an_interval_only_with_step_times() -> None:
    assert against([result(20, TEN)], [result(10, TEN)]).speed is None
    assert "no interval, so no verdict" in against([result(20, TEN)], [result(10, TEN)]).verdict
    times = [50.0, 51.0, 49.0, 50.5]
    found = against(
        [result(20, TEN, step_times_ms=times)], [result(10, TEN, "theirs", step_times_ms=[2 * one for one in times])]
    )
    assert found.speed is not None
    assert 1.8 < found.speed.low <= 2.0 <= found.speed.high < 2.2
    assert "of one round each" in found.verdict
