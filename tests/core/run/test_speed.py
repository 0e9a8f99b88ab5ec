"""MFU never exceeds 100 %, and each line's can be computed from the file alone: with invented step times and peaks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from weftrain.core.backend import Fingerprint, Plan, State, StepResult
from weftrain.core.config import Recipe
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.metrics import METRICS, MetricsWriter, read_metrics
from weftrain.core.run.speed import Peak, Speed, recorded_peak, run_utilization
from weftrain.core.trainer import fit

FLOPS_PER_TOKEN, TOKENS = 1000.0, 52


class Timed:
    """A run whose steps take the given ms."""

    def __init__(self, step_ms: list[float]) -> None:
        self.step_ms = step_ms

    def train(self, source: Any) -> Iterator[StepResult]:
        for step, ms in enumerate(self.step_ms):
            yield StepResult(step, 1.0, 1.0, {}, TOKENS, TOKENS, ms, 0.0)

    def export_state(self) -> State:
        return State(len(self.step_ms), 0, {})

    def fingerprint(self) -> Fingerprint:
        return Fingerprint("timed", "cpu", "none")

    def stats(self) -> dict[str, float]:
        return {}


def logged(folder: Path, recipe: Recipe, step_ms: list[float], speed: Speed) -> list[dict[str, Any]]:
    plan = Plan(0, len(step_ms), checkpoint_at_end=False)
    with MetricsWriter(folder) as metrics:
        metrics.event("start", step=0, **speed.as_record())
        run: Any = Timed(step_ms)
        list(
            fit(
                run,
                plan,
                recipe,
                synthetic_source(97, 13, 12, 4, 5),
                [],
                folder / "checkpoints",
                metrics,
                Ledger(folder),
                speed=speed,
            )
        )
    return read_metrics(folder)


def test_a_step_that_beats_the_peak_has_it_measured_again(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Peaks as a busy machine gives them: 2.0, then 4.0 and 5.0 MFLOP/s; the steps reach 1.04, 2.6, 3.9, 5.2, 5.2 and
    1.04.
    """
    measured = iter([Peak(4e6, "second"), Peak(5e6, "third")])
    speed = Speed(FLOPS_PER_TOKEN, Peak(2e6, "first", "m"), lambda: next(measured))
    records = logged(tmp_path, tiny_recipe(), [50.0, 20.0, 40.0 / 3, 10.0, 10.0, 50.0], speed)
    told = [(record["kind"], record["step"], record.get("peak_flops")) for record in records if "peak_flops" in record]
    assert told == [("start", 0, 2e6), ("peak", 2, 4e6), ("peak", 4, pytest.approx(5.2e6))]
    origins = [record["peak_origin"] for record in records if "peak_flops" in record]
    assert origins == ["first", "second", "achieved by a step itself; 0 GFLOP/s (third)"]
    # Every line again, from what stands before it in the file.
    force, shares = {}, []
    for line in (tmp_path / METRICS).read_text().splitlines():
        record = json.loads(line)
        if "peak_flops" in record:
            force = record
        if record["kind"] == "step":
            again = record["tokens_per_second"] * force["flops_per_token"] / force["peak_flops"]
            assert record["model_flops_utilization"] == pytest.approx(again, rel=1e-15)
            shares.append(record["model_flops_utilization"])
    assert shares == pytest.approx([0.52, 0.65, 0.975, 1.0, 1.0, 0.2])
    assert max(shares) <= 1
    used = run_utilization(records)
    assert used is not None
    assert used[0] == pytest.approx((2.6 + 3.9) / 2 / 5.2)  # the median step, of the highest peak of all
    assert used[1].flops == pytest.approx(5.2e6)


def test_what_has_no_duration_has_no_utilization(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    records = logged(tmp_path, tiny_recipe(), [0.0, 50.0], Speed(FLOPS_PER_TOKEN, Peak(2e6, "first", "m")))
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["model_flops_utilization"] for record in steps] == ["unknown", pytest.approx(0.52)]


def test_a_later_start_on_the_machine_keeps_the_peak(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    assert recorded_peak(path, "m") is None
    lines = [
        {"kind": "start", "step": 0, "flops_per_token": 5.0, **of}
        for of in (
            {"peak_flops": 1.0, "peak_origin": "old"},
            {"peak_flops": 2.0, "peak_origin": "a", "peak_machine": "m"},
            {"peak_flops": 3.0, "peak_origin": "b", "peak_machine": "m"},
            {"peak_flops": None, "peak_origin": "c", "peak_machine": "m"},
            {"peak_flops": 9.0, "peak_origin": "d", "peak_machine": "other"},
            {"peak_flops": -1.0, "peak_origin": "e", "peak_machine": "m"},
        )
    ]
    path.write_text("".join(json.dumps({"time": 0.0, **line}) + "\n" for line in lines) + "{torn\n")
    assert recorded_peak(path, "m") == Peak(3.0, "b", "m")
    assert recorded_peak(path, "elsewhere") is None


def test_a_run_that_moved_is_measured_against_the_machine_it_ended_on() -> None:
    def start(peak: float, machine: str) -> dict[str, Any]:
        return {"kind": "start", "peak_flops": peak, "peak_origin": "", "peak_machine": machine, "flops_per_token": 2.0}

    steps = [{"kind": "step", "tokens_per_second": rate} for rate in (40.0, 40.0, 5.0, 6.0, 7.0)]
    used = run_utilization([start(100.0, "fast"), *steps[:2], start(20.0, "slow"), *steps[2:]])
    assert used == (12.0 / 20.0, Peak(20.0, "", "slow"))
    assert run_utilization([start(1.0, "x"), *steps]) is None  # as earlier versions left it: five times its own peak
    assert run_utilization(steps) is None
