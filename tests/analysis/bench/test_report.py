"""Every figure of a report by hand, with an invented clock and known counts; and three ways to get it wrong that are
caught.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from invented_runs import Clock, InventedRun, Tiny

from weftrain.analysis.bench.report import (
    BenchReport,
    BenchRound,
    ReportError,
    breakdown_of,
    configuration_differences,
    correctness_of,
    efficiency_of,
    read_report,
    speed_of,
)
from weftrain.analysis.bench.train import bench_source, take_steps
from weftrain.core.config import Recipe
from weftrain.core.parameters import flops_per_token
from weftrain.core.run.speed import Peak


def measured(clock: Clock, recipe: Recipe, ms: list[float]) -> BenchRound:
    return take_steps(InventedRun(clock, ms), bench_source(recipe))  # type: ignore[arg-type]


def test_speed_by_hand(clock: Clock, tiny_recipe: Tiny) -> None:
    found = measured(clock, tiny_recipe(), [900.0, 10.0, 12.0, 11.0, 20.0])
    assert found.step_ms == pytest.approx([900.0, 10.5, 12.5, 11.5, 20.5])  # the gap before a result counts to its step
    speed = speed_of([found], tokens_per_step=52, devices=2)
    assert speed.warm_up_steps == 1
    assert speed.step_ms_p50 == pytest.approx(12.0)
    assert speed.tokens_per_second == pytest.approx(52 / 0.012)
    assert speed.tokens_per_second_per_device == pytest.approx(52 / 0.012 / 2)
    assert (speed.step_ms_min, speed.step_ms_mean) == pytest.approx((10.5, 13.75))
    assert speed.step_ms_p90 == pytest.approx(12.5 + 0.7 * 8)
    assert speed.compile_s == pytest.approx(0.888)
    assert speed.step_ms_p50_low <= 12.0 <= speed.step_ms_p50_high


def test_the_parts_add_up_to_the_step(clock: Clock, tiny_recipe: Tiny) -> None:
    found = measured(clock, tiny_recipe(), [900.0, 10.0, 12.0, 11.0, 20.0])
    parts, _ = breakdown_of([found], 1)
    assert sum(parts.values()) == pytest.approx(13.75)
    assert parts["forward"] == 5.0
    assert parts["data wait"] == 0.25
    assert parts["host gap"] == pytest.approx(0.5)
    assert parts["remainder"] == pytest.approx(1.0)  # what InventedRun leaves out of its parts
    untimed = found.model_copy(update={"phases_ms": [{}] * 5})
    parts, note = breakdown_of([untimed], 1)
    assert sum(parts.values()) == pytest.approx(13.75)
    assert "does not time the parts" in note


def test_efficiency_by_hand(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber")
    per_token = flops_per_token(recipe.model, 13)
    found = efficiency_of(recipe, 1000.0, Peak(per_token * 4000.0, "here"), Peak(None, "no sourced peak"), "none")
    assert found.flops_per_second == per_token * 1000
    assert found.mfu_measured == pytest.approx(0.25)
    assert (found.mfu_sourced, found.sourced_peak_flops, found.hfu_measured) == ("unknown", "unknown", None)
    again = efficiency_of(recipe, 1000.0, Peak(per_token * 4000.0, "here"), Peak(None, ""), "full")
    head = 6 * 97 * 48
    assert again.hfu_measured == pytest.approx((per_token + (per_token - head) / 3) / per_token / 4)
    assert again.mfu_measured == found.mfu_measured


def test_correctness() -> None:
    assert correctness_of([5.0, 4.0], [5.0, 4.0001], "float32").passed is True
    assert correctness_of([5.0, 4.0], [5.0, 4.01], "float32").passed is False
    assert correctness_of([5.0, float("nan")], [5.0, 4.0], "bfloat16").passed is False
    unchecked = correctness_of([5.0], [], "float32", "too large")
    assert (unchecked.passed, unchecked.words) == (None, "too large")


def test_too_few_steps(clock: Clock, tiny_recipe: Tiny) -> None:
    with pytest.raises(ReportError, match="give more --steps"):
        speed_of([measured(clock, tiny_recipe(), [9.0, 1.0])], 52, 1)


def test_steps_in_units_of_the_yardstick(report: BenchReport) -> None:
    speed = report.speed.model_copy(update={"warm_up_steps": 1})
    changes = {"speed": speed, "rounds": [[99.0, 10.0, 15.0, 20.0]], "probes": [[4.0, 4.0, 4.0, 8.0, 8.0]]}
    assert report.model_copy(update=changes).in_probes == [[2.5, 2.5, 2.5]]
    assert report.model_copy(update=changes | {"probes": [[]]}).in_probes is None


def test_differences_of_configuration(report: BenchReport) -> None:
    assert configuration_differences(report, report) == []
    recipe = {**report.identity["recipe"], "seed": 7}
    other = report.model_copy(update={"identity": {**report.identity, "recipe": recipe}, "kernels": {}})
    found = configuration_differences(report, other)
    assert "recipe.seed: 0 -> 7" in found
    assert any(line.startswith("kernels.") for line in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{}", "key 'name': Field required"),
        (b"no", "Expecting value"),
        (b'{"name": 1, "name": 2}', "name"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema_version": 2}', "key 'schema_version': Input should be 1"),
    ],
)
def test_files_that_are_no_reports(text: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(ReportError, match=words):
        read_report(tmp_path)
    with pytest.raises(ReportError, match="is not there"):
        read_report(tmp_path / "nothing")
