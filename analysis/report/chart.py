"""Charts of a run as data for charts.js, which draws them with Bokeh in the browser, and as a table of their figures.

A curve is thinned to the minimum and maximum of each bucket, so that a spike remains visible, and to the mean of each
bucket, which the page smooths. Bokeh's scripts come from the installed package and lie in the page.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from weftrain.analysis.markup import escape, visible
from weftrain.analysis.report.ledger import Band, Mark

MAX_POINTS = 1500  # a curve
MAX_BANDS = 80  # more would be thinner than a line
MAX_MARKS = 400  # places on the step axis
MARK_NAMES = {
    "bad": "not finite",
    "rollback": "rollback",
    "alert": "alert",
    "skip": "step skipped",
    "restart": "restart",
    "recipe": "recipe changed",
    "defer": "chunk deferred",
}  # the gravest first, which names a place


class Columns(Protocol):
    """Points stored as columns, since there may be millions."""

    @property
    def steps(self) -> np.ndarray: ...
    @property
    def values(self) -> np.ndarray: ...


Points = Sequence[tuple[int, float]] | Columns  # (completed steps, value), ascending


@dataclass(frozen=True)
class Curve:
    """colour: 0..5, of the page's. abandoned: why it does not count; drawn faintly. dots: a dot a point, and a line."""

    name: str
    points: Points
    colour: int = 0
    abandoned: str | None = None
    dots: bool = False
    smooth: bool = False  # whether the page's smoothing applies


@dataclass(frozen=True)
class Chart:
    """What is drawn. unit: of the values. last_step: right end of the axis. level: a named value drawn across."""

    title: str
    unit: str
    curves: Sequence[Curve]
    last_step: int
    marks: Sequence[Mark] = ()
    bands: Sequence[Band] = ()
    level: tuple[float, str] | None = None
    from_zero: bool = False


def drawable(values: np.ndarray) -> np.ndarray:
    """Which values have a place on an axis: finite, with finite differences. float64 [n] -> bool [n]"""
    return np.abs(values) < 1e100  # false for nan


def columns(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """The points' steps int64 [n] and values float64 [n]."""
    if not isinstance(points, Sequence):
        return points.steps, points.values
    return np.array([step for step, _ in points], dtype=np.int64), np.array(
        [value for _, value in points], dtype=np.float64
    )


def thinned(values: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """Places of at most `limit` values: the first, the last, and the minimum and maximum of each of equal buckets."""
    count = len(values)
    if count <= limit:
        return np.arange(count)
    parts = (limit - 2) // 2
    edges = (1 + (count - 2) * np.arange(parts + 1) // parts).tolist()
    kept = [0, count - 1]
    for low, high in pairwise(edges):
        kept += {low + int(values[low:high].argmin()), low + int(values[low:high].argmax())}
    return np.array(sorted(kept))


def means(steps: np.ndarray, values: np.ndarray, limit: int = MAX_POINTS // 2) -> tuple[np.ndarray, np.ndarray]:
    """The mean step and mean value of each of at most `limit` equal buckets of finite points."""
    edges = len(values) * np.arange(min(limit, len(values))) // max(min(limit, len(values)), 1)
    sizes = np.diff(np.append(edges, len(values)))
    return np.add.reduceat(steps, edges) / sizes, np.add.reduceat(values, edges) / sizes


# What charts.js reads


class MarkPlaces:
    """Marks by their places on the step axis. The charts of a page have the same ones, which may be a hundred thousand:
    each sequence of marks is gone through once.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Sequence[Mark], dict[int, list[Mark]], dict[int, list[Any]]]] = {}

    def of(self, chart: Chart) -> tuple[dict[int, list[Mark]], dict[int, list[Any]]]:
        """The chart's own marks by place, and what is drawn of each place."""
        key = id(chart.marks), chart.last_step  # the marks are kept, so that no others get their id
        if key not in self._known:
            places = _by_place(chart.marks, chart.last_step)
            self._known[key] = chart.marks, places, {place: _mark(found) for place, found in places.items()}
        return self._known[key][1:]


def chart_data(chart: Chart, places: MarkPlaces) -> dict[str, Any] | None:
    """The chart as JSON values, every text with its hidden characters made visible; None where no value is finite.

    places: the same for all charts of a page.
    """
    curves = [found for curve in chart.curves if (found := _curve(curve)) is not None]
    if not curves:
        return None
    finite = np.concatenate([values[drawable(values)] for _, values in (columns(one.points) for one in chart.curves)])
    low, high, middle = float(finite.min()), float(finite.max()), float(np.median(finite))
    clipped = [float(value) for value in np.quantile(finite, (0.01, 0.99))]
    positive = low > 1e-100
    return {
        "title": chart.title,
        "unit": chart.unit,
        "curves": sorted(curves, key=lambda one: not one["left"]),
        "last": chart.last_step,
        "marks": _marks(chart, places),
        "bands": _bands(chart),
        "level": None if chart.level is None else [chart.level[0], visible(chart.level[1])],
        "zero": chart.from_zero and low >= 0,
        "range": [low, high],
        "clip": clipped,
        "positive": positive,
        # A few values far above the others, a first loss or a spike, would flatten the rest.
        "log": positive and not chart.from_zero and high > 3 * middle,
    }


def _curve(curve: Curve) -> dict[str, Any] | None:
    steps, values = columns(curve.points)
    shown = drawable(values)
    if not shown.any():
        return None
    gaps = steps[~shown]
    steps, values = steps[shown], values[shown]
    kept = thinned(values)
    found: dict[str, Any] = {
        "name": visible(curve.name),
        "colour": curve.colour,
        "left": "" if curve.abandoned is None else visible(curve.abandoned),
        "dots": curve.dots and len(kept) <= 300,
        **_broken(steps[kept], values[kept], gaps),
    }
    if curve.smooth and curve.abandoned is None:
        mean_steps, mean_values = means(steps, values)
        found["means"] = [np.round(mean_steps, 1).tolist(), _numbers(mean_values)]
    return found


def _broken(steps: np.ndarray, values: np.ndarray, gaps: np.ndarray) -> dict[str, Any]:
    """The points with a null between two that a value which is not finite separates."""
    places = np.searchsorted(gaps, steps)
    breaks = np.flatnonzero(np.diff(places)) + 1
    y: list[float | None] = _numbers(values)
    x = steps.tolist()
    for place in reversed(breaks.tolist()):
        y.insert(place, None)
        x.insert(place, int(gaps[places[place] - 1]))
    return {"x": x, "y": y}


def _numbers(values: np.ndarray) -> list[Any]:
    """As few digits as a screen can show."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _bands(chart: Chart) -> list[list[Any]]:
    if not 1 < len(chart.bands) <= MAX_BANDS:
        return []
    return [[band.first_step, band.stop_step, visible(band.words)] for band in chart.bands]


def _marks(chart: Chart, places: MarkPlaces) -> list[list[Any]]:
    """[step, kind, whether abandoned, words] of each place on the step axis, from left to right."""
    bad = list[Mark]()
    for curve in chart.curves:
        steps, values = columns(curve.points)
        hidden = np.flatnonzero(~drawable(values))
        bad += [
            Mark(int(steps[one]), "bad", f"{curve.name} is {float(values[one])}", curve.abandoned is not None)
            for one in hidden[:10_000]
        ]
    marks, drawn = places.of(chart)
    own = {place: _mark([*marks.get(place, ()), *more]) for place, more in _by_place(bad, chart.last_step).items()}
    return [one for _, one in sorted((drawn | own).items())]


def _by_place(marks: Sequence[Mark], last_step: int) -> dict[int, list[Mark]]:
    found: dict[int, list[Mark]] = {}
    for mark in marks:
        found.setdefault(mark.step * MAX_MARKS // last_step, []).append(mark)
    return found


def _mark(found: Sequence[Mark]) -> list[Any]:
    kinds = {mark.kind for mark in found}
    kind = next(kind for kind in MARK_NAMES if kind in kinds)
    lines = [f"step {mark.step:,}: {mark.words}{' (abandoned)' if mark.abandoned else ''}" for mark in found[:8]]
    lines += [f"and {len(found) - 8:,} more"] if len(found) > 8 else []
    return [found[0].step, kind, all(mark.abandoned for mark in found), visible("; ".join(lines))]


# What lies in the page


def chart_html(chart: Chart, number: int) -> str:
    """The place at which charts.js draws chart `number`; a sentence where there is nothing to draw."""
    if not any(drawable(columns(curve.points)[1]).any() for curve in chart.curves):
        place = '<p class="absent">No finite value was logged.</p>'
    else:
        told = f"{chart.title} over completed steps. {'; '.join(_described(chart))}."
        place = f'<div class="plot" id="chart-{number}" role="img" aria-label="{escape(told)}"></div>'
    head = f'<b>{escape(chart.title)}</b> <span class="soft">{escape(chart.unit)}</span>'
    return f'<figure class="chart"><figcaption>{head}</figcaption>{place}</figure>'


def _described(chart: Chart) -> list[str]:
    return [
        f"{name}: {first} at step {first_step}, {last} at step {last_step}, least {low} at step {low_step}, "
        f"greatest {high} at step {high_step}"
        for name, first, first_step, last, last_step, low, low_step, high, high_step in figures(chart)
    ]


def figures(chart: Chart) -> list[tuple[str, ...]]:
    """(name, first, its step, last, its step, least, its step, greatest, its step) of each curve that counts."""
    found = []
    for curve in chart.curves:
        steps, values = columns(curve.points)
        shown = drawable(values)
        if curve.abandoned is None and shown.any():
            steps, values = steps[shown], values[shown]
            places = (0, -1, values.argmin(), values.argmax())
            pairs = ((f"{float(values[one]):,.5g}", f"{int(steps[one]):,}") for one in places)
            found.append((curve.name, *(word for pair in pairs for word in pair)))
    return found


def scripts() -> tuple[str, ...] | None:
    """Bokeh's scripts and ours, in the order in which a page needs them; None where Bokeh is not installed."""
    try:
        folder = importlib.resources.files("bokeh") / "server" / "static" / "js"
        bokeh = [(folder / name).read_text(encoding="utf-8") for name in ("bokeh.min.js", "bokeh-api.min.js")]
    except (ImportError, OSError):
        return None
    ours = (importlib.resources.files("weftrain.analysis.report") / "charts.js").read_text(encoding="utf-8")
    return (*bokeh, ours)


def data_html(charts: Sequence[Chart]) -> str:
    """The data block of a page: JSON, which no browser runs, without the characters that end a script."""
    places = MarkPlaces()
    words = {"charts": [chart_data(chart, places) for chart in charts], "marks": MARK_NAMES}
    data = json.dumps(words, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="charts">{data}</script>'
