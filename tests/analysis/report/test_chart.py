"""Charts keep spikes, breaks and marks, and no long run makes a large page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from made_runs import Made, data_of, page_of

from weftrain.analysis.report.chart import (
    MAX_POINTS,
    Chart,
    Curve,
    MarkPlaces,
    chart_data,
    chart_html,
    data_html,
    figures,
    means,
    scripts,
    thinned,
)
from weftrain.analysis.report.ledger import Band, Mark
from weftrain.core.run.metrics import METRICS


def test_thinning_keeps_every_spike_and_both_ends() -> None:
    values = np.sin(np.arange(100_000) / 900)
    values[31_416], values[31_417], values[99_990] = 50.0, -50.0, 7.0
    kept = thinned(values).tolist()
    assert len(kept) <= MAX_POINTS
    assert {0, 99_999, 31_416, 31_417, 99_990} <= set(kept)
    assert kept == sorted(set(kept))
    assert thinned(values[:MAX_POINTS]).tolist() == list(range(MAX_POINTS))
    assert len(thinned(values[: MAX_POINTS + 1])) <= MAX_POINTS


@pytest.mark.parametrize("count", [1, 2, 749, 750, 751, 12_345])
def test_means_weigh_every_point(count: int) -> None:
    steps, values = np.arange(count), np.arange(count) % 7.0
    mean_steps, mean_values = means(steps, values)
    assert len(mean_steps) == min(count, MAX_POINTS // 2)
    sizes = np.diff([*(count * np.arange(len(mean_steps)) // len(mean_steps)), count])
    assert (mean_values * sizes).sum() == pytest.approx(values.sum())
    assert (np.diff(mean_steps) > 0).all()


def curve_of(points: list[tuple[int, float]]) -> dict[str, list[float | None]]:
    data = chart_data(Chart("Loss", "nats", [Curve("training", points)], points[-1][0]), MarkPlaces())
    assert data is not None
    found: dict[str, list[float | None]] = data["curves"][0]
    return found


def test_a_spike_in_a_long_run_is_on_the_page(tmp_path: Path) -> None:
    made = Made(tmp_path / "long", steps=20_000, chunks=None)
    lines = [
        json.dumps({"kind": "step", "time": 1.0, "step": step, "loss": 90.0 if step == 7003 else 2.0})
        for step in range(1, 20_001)
    ]
    (made.run / METRICS).write_text("\n".join(lines) + "\n")
    page = page_of(made.run)
    loss = data_of(page)["charts"][0]
    (curve,) = loss["curves"]
    assert [step for step, value in zip(curve["x"], curve["y"], strict=True) if value > 2] == [7003]
    assert loss["log"]
    assert "greatest 90 at step 7,003" in page
    assert len(page) - sum(map(len, scripts() or ())) < 100_000


def test_a_value_that_is_not_finite_breaks_the_curve_and_is_marked() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.5), (6, 1.2)]
    chart = Chart("Loss", "nats", [Curve("training", points)], 6)
    data = chart_data(chart, MarkPlaces())
    assert data is not None
    assert data["curves"][0]["y"] == [1.0, 2.0, None, 1.5, 1.2]
    assert data["curves"][0]["x"] == [1, 2, 4, 5, 6]
    assert data["marks"] == [[3, "bad", False, "step 3: training is nan"], [4, "bad", False, "step 4: training is inf"]]
    empty = Chart("Loss", "nats", [Curve("training", [(1, math.nan)])], 6)
    assert chart_data(empty, MarkPlaces()) is None
    assert "No finite value" in chart_html(empty, 0)
    assert '"charts":[null]' in data_html([empty])


def test_a_broken_curve_stays_broken_when_it_is_thinned() -> None:
    points = [(step, math.nan if step == 5000 else 1.0 + step % 3) for step in range(1, 10_001)]
    found = curve_of(points)
    assert found["y"].count(None) == 1
    assert found["x"] == sorted(found["x"])  # type: ignore[type-var]


def test_marks_in_one_place_are_one_line_that_names_each() -> None:
    marks = [Mark(5001 + number, "skip", f"words {number}") for number in range(12)] + [Mark(5003, "rollback", "back")]
    data = chart_data(
        Chart("Loss", "nats", [Curve("training", [(1, 1.0), (10_000, 2.0)])], 10_000, marks), MarkPlaces()
    )
    assert data is not None
    ((step, kind, left, words),) = data["marks"]
    assert (step, kind, left) == (5001, "rollback", False)
    assert "step 5,008: words 7" in words
    assert words.endswith("; and 5 more")


class CountedMarks(list[Mark]):
    """Marks that count how often they are gone through."""

    times = 0

    def __iter__(self) -> Iterator[Mark]:
        self.times += 1
        return super().__iter__()


def test_charts_of_a_page_sort_their_marks_once_and_each_has_its_own_beside() -> None:
    marks = CountedMarks([Mark(30, "skip", "one"), Mark(70, "restart", "two"), Mark(71, "skip", "three")])
    curves = ([(1, 1.0), (70, math.nan), (100, 2.0)], [(1, math.inf), (30, 1.0), (100, 2.0)], [(1, 1.0), (100, 2.0)])
    charts = [Chart("Loss", "nats", [Curve("c", points)], 100, marks) for points in curves]
    places = MarkPlaces()
    found = [chart_data(chart, places) for chart in charts]
    assert marks.times == 1
    assert found == [chart_data(chart, MarkPlaces()) for chart in charts]
    (first, second, third) = (data["marks"] for data in found if data is not None)
    assert third == [
        [step, kind, False, f"step {step}: {words}"]
        for step, kind, words in ((30, "skip", "one"), (70, "restart", "two"), (71, "skip", "three"))
    ]
    assert first == [third[0], [70, "bad", False, "step 70: two; step 70: c is nan"], third[2]]
    assert second == [[1, "bad", False, "step 1: c is inf"], *third]


def test_chunks_are_bands_while_they_can_be_told_apart() -> None:
    curve = Curve("training", [(1, 1.0), (100, 2.0)])
    for count, shown in ((1, 0), (2, 2), (80, 80), (81, 0)):
        bands = [Band(number, number, number + 1, f"chunk {number}") for number in range(count)]
        data = chart_data(Chart("Loss", "nats", [curve], 100, bands=bands), MarkPlaces())
        assert data is not None
        assert len(data["bands"]) == shown


@pytest.mark.parametrize(
    "values", [[2.0], [0.0, 0.0], [-3.0, 5.0], [1e-300, 1.0], [1e99, -1e99], [1e300, 1.0], [5e-324, 1e-310]]
)
def test_every_axis_is_of_numbers(values: list[float]) -> None:
    for from_zero in (False, True):
        chart = Chart("Loss", "nats", [Curve("training", list(enumerate(values, 1)))], len(values), from_zero=from_zero)
        data = json.loads(data_html([chart]).partition(">")[2].removesuffix("</script>"))["charts"][0]
        assert not data["log"] or data["range"][0] > 0
        assert data["range"][0] <= data["range"][1]
        assert figures(chart)
