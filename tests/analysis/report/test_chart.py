"""Charts keep spikes, breaks and marks."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from made_runs import Made, page_of

from weftrain.analysis.report.chart import MAX_POINTS, Chart, Curve, chart_html, even_ticks, medians, thinned
from weftrain.analysis.report.ledger import Mark
from weftrain.core.run.metrics import METRICS


def test_thinning_keeps_every_spike_and_both_ends() -> None:
    points = [(step, math.sin(step / 900)) for step in range(100_000)]
    points[31_416] = (31_416, 50.0)
    points[31_417] = (31_417, -50.0)
    points[99_990] = (99_990, 7.0)
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS
    assert {points[0], points[-1], (31_416, 50.0), (31_417, -50.0), (99_990, 7.0)} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]
    assert len(thinned(points[: MAX_POINTS + 1])) <= MAX_POINTS


def test_medians_are_those_of_their_parts() -> None:
    found = medians([(step, float(step % 10)) for step in range(1500)])
    assert len(found) == 150
    assert {value for _, value in found} == {4.5}


def paths(page: str, kind: str) -> list[str]:
    return [
        drawn for classes, drawn in re.findall(r'<path class="([^"]*)" d="([^"]*)"', page) if kind in classes.split()
    ]


def test_a_spike_in_a_long_run_is_on_the_page(tmp_path: Path) -> None:
    made = Made(tmp_path / "long", steps=20_000, chunks=None)
    lines = [
        json.dumps({"kind": "step", "time": 1.0, "step": step, "loss": 90.0 if step == 7003 else 2.0})
        for step in range(1, 20_001)
    ]
    (made.run / METRICS).write_text("\n".join(lines) + "\n")
    page = page_of(made.run)
    (raw,) = paths(page, "raw")
    places = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([0-9.]+ [0-9.]+)", raw)]
    assert len(places) <= MAX_POINTS
    top = min(places, key=lambda place: place[1])
    assert top[0] == pytest.approx(1000 * 7003 / 20_000, abs=0.06)
    assert [place for place in places if place[1] < 200] == [top]
    assert "nats a token, logarithmic" in page
    assert "greatest 90 at step 7,003" in page
    assert len(page) < 200_000


def test_a_value_that_is_not_finite_breaks_the_curve_and_is_shown() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.5), (6, 1.2)]
    figure = chart_html(Chart("Loss", "nats", [Curve("training", points)], 6))
    (line,) = paths(figure, "line")
    assert [len(re.findall("L", part)) for part in line.split("M")[1:]] == [1, 1]
    assert "step 3: training is nan" in figure
    assert "step 4: training is inf" in figure
    assert "No finite value" in chart_html(Chart("Loss", "nats", [Curve("training", [(1, math.nan)])], 6))


def test_a_broken_curve_stays_broken_when_it_is_thinned() -> None:
    points = [(step, math.nan if step == 5000 else 1.0 + step % 3) for step in range(1, 10_001)]
    (line,) = paths(chart_html(Chart("Loss", "nats", [Curve("training", points)], 10_000)), "line")
    assert line.count("M") == 2


def test_marks_in_one_place_are_one_line_that_names_each() -> None:
    marks = [Mark(5000 + number, "skip", f"words {number}") for number in range(12)] + [Mark(5003, "rollback", "back")]
    figure = chart_html(Chart("Loss", "nats", [Curve("training", [(1, 1.0), (10_000, 2.0)])], 10_000, marks))
    assert figure.count('<g class="mark') == 1
    assert '<g class="mark rollback">' in figure
    assert "step 5,007: words 7" in figure
    assert "and 5 more" in figure
    assert ">BS</span>" in figure


@pytest.mark.parametrize(
    "values", [[2.0], [0.0, 0.0], [-3.0, 5.0], [1e-300, 1.0], [1e99, -1e99], [1e300, 1.0], [5e-324, 1e-310]]
)
def test_every_axis_has_places_within_the_picture(values: list[float]) -> None:
    for from_zero in (False, True):
        points = list(enumerate(values, 1))
        figure = chart_html(Chart("Loss", "nats", [Curve("training", points)], len(points), from_zero=from_zero))
        assert "nan" not in figure.replace("is nan", "")
        for drawn in paths(figure, "line") + paths(figure, "grid"):
            assert all(-0.1 <= float(number) <= 1000.1 for number in re.findall(r"-?[0-9.]+(?:e[-+]?\d+)?", drawn))


def test_ticks_are_round_and_within() -> None:
    assert even_ticks(0, 40_000, 6) == [0, 10_000, 20_000, 30_000, 40_000]
    assert even_ticks(2.03, 2.31, 5) == pytest.approx([2.1, 2.2, 2.3])
    assert even_ticks(1.0, 1.0, 5) == [1.0]
