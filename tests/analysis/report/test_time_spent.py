"""Where a run's time went: every second is in one part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weftrain.analysis.report.curves import read_curves
from weftrain.analysis.report.time_spent import time_spent
from weftrain.core.run.metrics import MetricsWriter


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def steps(writer: MetricsWriter, clock: Clock, first: int, last: int, every: int, step_s: float) -> None:
    for step in range(first, last + 1):
        clock.now_s += step_s
        if step % every == 0:
            record: dict[str, Any] = {"step": step, "loss": 1.0, "grad_norm": 1.0, "learning_rate": {}, "tokens": step}
            writer.step({**record, "step_ms": step_s * 1e3, "skipped": False})


@pytest.mark.parametrize("every", [1, 2])
def test_each_second_is_counted_once(every: int, tmp_path: Path) -> None:
    clock = Clock()
    clock.now_s += 30  # until the first step
    with MetricsWriter(tmp_path, clock=clock) as writer:
        steps(writer, clock, 1, 10, every, 2.0)
        clock.now_s += 8
        writer.evaluation({"step": 10, "set": "held", "loss": 2.0, "tokens": 5, "evaluation_s": 8.0})
        steps(writer, clock, 11, 16, every, 2.0)
    clock.now_s += 100  # nothing ran
    with MetricsWriter(tmp_path, 12, clock=clock) as writer:
        steps(writer, clock, 13, 20, every, 3.0)
    found = time_spent(read_curves(tmp_path, []), 1000.0)
    assert found is not None
    assert found.whole_s == pytest.approx(30 + 20 + 8 + 12 + 100 + 24)
    assert found.steps_s == pytest.approx(12 * 2 + 8 * 3)
    assert found.again_s == pytest.approx(4 * 2)
    assert found.evaluations_s == 8.0
    assert found.rest_s == pytest.approx(130)
    assert found.goodput == pytest.approx(48 / 194)
    assert ("in evaluations", "4.1%, 8 s") in found.words()
    shares = [float(value.partition("%")[0]) for _, value in found.words()[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_a_record_without_times_tells_nothing(tmp_path: Path) -> None:
    clock = Clock()
    with MetricsWriter(tmp_path, clock=clock) as writer:
        steps(writer, clock, 1, 2, 1, 1.0)
    curves = read_curves(tmp_path, [])
    assert time_spent(curves, None) is None
    assert time_spent(curves, 1e9) is None  # a clock that was set back
    assert time_spent(curves, 1000.0) is not None
