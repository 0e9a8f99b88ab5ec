"""The train loss of a comparison is a mean over complete windows."""

from __future__ import annotations

import pytest
from compare_cases import series

from weftrain.analysis.compare.series import (
    TRAIN_LOSS,
    Series,
)
from weftrain.analysis.compare.table import compare, headings
from weftrain.analysis.compare.window import default_window, smoothed_at, smoothed_curve


def test_train_loss_is_the_mean_over_a_window_that_was_trained() -> None:
    losses = [(step, 10 * step, float(step)) for step in (1, 2, 3, 4, 10)]
    assert smoothed_at(losses, 4, 2, 1) == 3.5
    assert smoothed_at(losses, 4, 1, 1) == 4.0
    assert smoothed_at(losses, 4, 4, 1) == 2.5
    assert smoothed_at(losses, 4, 5, 1) is None, "only four steps were trained"
    assert smoothed_at(losses, 9, 9, 1) is None, "the newest logged loss is older than the log's rhythm"
    assert smoothed_at(losses, 9, 9, 6) == 2.5
    assert smoothed_at(losses, 0, 1, 1) is None
    assert smoothed_curve(losses, 2) == [(20, 1.5), (30, 2.5), (40, 3.5), (100, 10.0)]
    assert smoothed_curve(losses, 11) == []
    for tokens, mean in smoothed_curve(losses, 3):
        assert mean == smoothed_at(losses, tokens // 10, 3, 1)


def test_the_window_lies_within_every_series() -> None:
    """A run of 24 steps has no mean of 100: that was 8.90 for 6.12."""

    def run(name: str, steps: int, every: int = 1) -> Series:
        losses = tuple(
            (step, 10 * step, 20.0 - step / 10) for step in range(1, steps + 1) if step == 1 or step % every == 0
        )
        return series(name, {step: {} for step in (2, steps)}, losses=losses, log_every_steps=every)

    assert [default_window([run("a", steps)]) for steps in (3, 24, 240, 5000)] == [1, 2, 24, 100]
    assert default_window([run("a", 240), run("b", 36)]) == 3
    assert default_window([run("a", 24, every=10)]) == 10
    assert default_window([series("a", {1: {}})]) == 1
    found = compare([run("a", 24), run("b", 240)])
    assert found.window_steps == 2
    assert [point.values.get(TRAIN_LOSS) for point in found.series[0].points] == [
        pytest.approx(19.85),
        pytest.approx(17.65),
    ]
    assert headings(found.columns, found.window_steps) == ["train loss, mean of 2 steps"]
    asked = compare([run("a", 24), run("b", 240)], window_steps=100)
    assert [point.values for point in asked.series[0].points] == [{}, {}]
    assert asked.series[1].points[1].values[TRAIN_LOSS] == pytest.approx(20 - 190.5 / 10)
    assert "a: no train loss: 24 steps were logged, the window is 100: give a smaller --window" in asked.notes
