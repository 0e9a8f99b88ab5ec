"""Reports beside each other: sides, intervals and ratios by hand; another machine is not measured in units of the probe."""

from __future__ import annotations

import json

import pytest

from weftrain.analysis.bench.compare import as_json, device_of, machine_of, plot, sides_of
from weftrain.analysis.bench.report import BenchReport, ReportError


def slower(report: BenchReport, factor: float, **environment: object) -> BenchReport:
    """The same report with every step and every probe `factor` as long, as on a slower machine."""
    times = {
        "rounds": [[ms * factor for ms in values] for values in report.rounds],
        "probes": [[ms * factor for ms in values] for values in report.probes],
        "environment": {**report.environment, **environment},
    }
    speed = report.speed.model_copy(update={"tokens_per_second": report.speed.tokens_per_second / factor})
    return report.model_copy(update={**times, "speed": speed})


def test_one_table_of_three(report: BenchReport) -> None:
    first, same, other = sides_of([report, slower(report, 2), slower(report, 2, cpu="another CPU")])
    assert (first.label, same.label, other.label) == ("A", "B", "C")
    assert (first.to_first, first.judged, first.speed_ratio) == (None, None, None)
    assert first.low < report.speed.tokens_per_second < first.high
    for side in (same, other):
        assert side.speed_ratio is not None
        ratio, low, high = side.speed_ratio
        assert ratio == pytest.approx(0.5)
        assert low <= ratio <= high
    assert same.in_probes is not None
    assert same.judged is same.in_probes
    assert same.in_probes.ratio == pytest.approx(1)  # twice the step, twice the probe: the machine drifted
    assert (other.in_probes, other.judged) == (None, other.to_first)
    assert any(line.startswith("environment.cpu: ") for line in other.differences)


def test_rounds_are_interleaved(report: BenchReport) -> None:
    a, b = sides_of([report, slower(report, 2), report, slower(report, 2)], rounds=2)
    assert (len(a.reports), len(b.reports)) == (2, 2)
    assert b.to_first is not None
    assert b.to_first.ratio == pytest.approx(2)
    for wrong in (1, 3):
        with pytest.raises(ReportError, match="are not"):
            sides_of([report] * wrong, rounds=wrong)


def test_another_batch_is_compared_by_token(report: BenchReport) -> None:
    shape = {**report.shape, "tokens_per_step": 2 * report.shape["tokens_per_step"]}
    (_, twice) = sides_of([report, slower(report, 2).model_copy(update={"shape": shape})])
    assert twice.to_first is not None
    assert twice.to_first.ratio == pytest.approx(1)


def test_words_json_and_picture(report: BenchReport) -> None:
    two = report.model_copy(update={"shape": {**report.shape, "devices": 2}})
    assert device_of(two) == "2 processes on the CPU"
    gpu = two.model_copy(update={"environment": {**report.environment, "device": "H200"}})
    assert device_of(gpu) == "2 x H200"
    assert " cores, " in machine_of(report)
    sides = sides_of([report] * 30)
    assert sides[-1].label == "R30"
    assert json.loads(json.dumps(as_json(sides), allow_nan=False))["sides"][0]["ratio"] is None
    assert plot(sides[:3]).startswith(b"\x89PNG")
    assert b"<svg" in plot(sides[:2], ".svg")
