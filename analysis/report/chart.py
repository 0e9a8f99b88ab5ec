"""Charts of a run as inline SVG: curves over completed steps with marks, chunk bands and a level; no script.

The picture is stretched to the page's width (preserveAspectRatio="none"), and only strokes keep their width, so it
holds no circle and no text: dots are strokes of no length with round ends, labels are HTML laid over it. A curve is
thinned to the minimum and maximum of each bucket, so that a spike remains visible.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from weftrain.analysis.markup import escape
from weftrain.analysis.report.ledger import Band, Mark

WIDTH, HEIGHT = 1000, 240
MAX_POINTS = 1500  # a curve
MAX_BANDS = 80  # more would be thinner than a line
_SMOOTH_FROM = 300  # points, from which on the medians are drawn too
_LETTERS = {"restart": "R", "rollback": "B", "skip": "S", "recipe": "C", "defer": "D"}
MARK_NAMES = {
    "restart": "restart",
    "rollback": "rollback",
    "skip": "step skipped",
    "recipe": "recipe changed",
    "defer": "chunk deferred",
}


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
    smooth: bool = False  # where it has many points, their medians are drawn over it


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
    key: bool = True  # whether the letters of the marks are explained, and chunks named
    show: Callable[[float], str] = "{:.4g}".format


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


def thinned(points: Points, limit: int = MAX_POINTS) -> list[tuple[int, float]]:
    """At most `limit` finite points: the first, the last, and the minimum and maximum of each of equal buckets."""
    steps, values = columns(points)
    kept: Any = np.arange(len(values))
    if len(values) > limit:
        edges = 1 + (len(values) - 2) * np.arange((limit - 2) // 2 + 1) // ((limit - 2) // 2)
        kept = [0]
        for low, high in pairwise(edges.tolist()):
            kept += sorted({low + int(values[low:high].argmin()), low + int(values[low:high].argmax())})
        kept.append(len(values) - 1)
    return list(zip(steps[kept].tolist(), values[kept].tolist(), strict=True))


def medians(points: Points, buckets: int = 150) -> list[tuple[int, float]]:
    """The middle step and median value of each of equal buckets of finite points."""
    steps, values = columns(points)
    edges = (len(values) * np.arange(buckets + 1) // buckets).tolist()
    return [
        (int(steps[(low + high) // 2]), float(np.median(values[low:high])))
        for low, high in pairwise(edges)
        if high > low
    ]


# The axes


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    logarithmic: bool

    def place(self, value: float) -> float:
        """The position of a value: 0 at the bottom, 1 at the top."""
        if self.logarithmic:
            value, low, high = math.log(max(value, self.low)), math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            for digits in ((1, 2, 5), (1, 3), (1,)):
                exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                found = [
                    digit * 10.0**e for e in exponents for digit in digits if self.low <= digit * 10.0**e <= self.high
                ]
                if len(found) <= 6:
                    break
            else:
                found = found[:: math.ceil(len(found) / 6)]
            if len(found) >= 2:
                return found
        return even_ticks(self.low, self.high, 5)


def _scale(values: np.ndarray, from_zero: bool) -> _Scale:
    """Logarithmic where a few values are far above the others, so that a spike does not flatten the rest."""
    low, high = float(values.min()), float(values.max())
    if not from_zero and low > 1e-100 and high > 6 * float(np.median(values)):
        return _Scale(low / 1.1, high * 1.1, True)
    if from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return _Scale(low if from_zero and low == 0 else low - margin, high + margin, False)


def even_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(count, 1)
    if not (math.isfinite(rough) and rough > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


# The picture


def chart_html(chart: Chart) -> str:
    """The chart as a <figure>; a sentence where there is nothing to draw."""
    every = np.concatenate([columns(curve.points)[1] for curve in chart.curves] or [np.empty(0)])
    finite = every[drawable(every)]
    if not len(finite):
        return f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption><p class="absent">No finite value was logged.</p></figure>'
    scale = _scale(finite if chart.level is None else np.append(finite, chart.level[0]), chart.from_zero)
    parts = [_bands(chart), _grid(scale)]
    parts += [_curve(curve, scale, chart) for curve in sorted(chart.curves, key=lambda curve: curve.abandoned is None)]
    parts += [_level(chart, scale), _marks(chart), *(_not_finite(curve, chart) for curve in chart.curves)]
    unit = f"{chart.unit}, logarithmic" if scale.logarithmic else chart.unit
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(_described(chart))}">'
        f"{''.join(parts)}</svg>"
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b> <span class="soft">{escape(unit)}</span></figcaption>'
        f'{_legend(chart)}<div class="plot">{_mark_labels(chart)}{picture}{_labels(chart, scale)}</div></figure>'
    )


def _x(step: float, chart: Chart) -> float:
    return WIDTH * min(max(step / chart.last_step, 0.0), 1.0)


def _curve(curve: Curve, scale: _Scale, chart: Chart) -> str:
    steps, values = columns(curve.points)
    shown = drawable(values)
    finite = _Finite(steps[shown], values[shown])
    if not shown.any():
        return ""
    gaps = steps[~shown].tolist()
    kind = "left" if curve.abandoned is not None else ""
    title = f"<title>{escape(curve.name if curve.abandoned is None else f'{curve.name}: {curve.abandoned}')}</title>"
    smooth = curve.smooth and len(finite.steps) >= _SMOOTH_FROM
    drawn = f'<path class="line c{curve.colour} {kind}{" raw" if smooth else ""}" d="{_path(thinned(finite), gaps, scale, chart)}"/>'
    if smooth:
        drawn += f'<path class="line c{curve.colour} {kind}" d="{_path(medians(finite), gaps, scale, chart)}"/>'
    if curve.dots:
        dots = "".join(f"M{_x(step, chart):.1f} {_y(value, scale):.1f}h0" for step, value in thinned(finite, 300))
        drawn += f'<path class="dots c{curve.colour} {kind}" d="{dots}"/>'
    return f"<g>{title}{drawn}</g>"


def _y(value: float, scale: _Scale) -> float:
    return HEIGHT * (1 - scale.place(value))


@dataclass(frozen=True)
class _Finite:
    steps: np.ndarray
    values: np.ndarray


def _path(points: Sequence[tuple[int, float]], gaps: Sequence[int], scale: _Scale, chart: Chart) -> str:
    """A line through the points, broken at each value that is not finite."""
    drawn, before = [], None
    for step, value in points:
        broken = before is None or bisect.bisect_right(gaps, before) != bisect.bisect_left(gaps, step)
        drawn.append(f"{'M' if broken else 'L'}{_x(step, chart):.1f} {_y(value, scale):.1f}{'h0' if broken else ''}")
        before = step
    return "".join(drawn)


def _not_finite(curve: Curve, chart: Chart) -> str:
    """A dot at the top edge for each nan or infinite value; those at one place are drawn once."""
    places: dict[int, list[tuple[int, float]]] = {}
    steps, values = columns(curve.points)
    hidden = ~drawable(values)
    for step, value in zip(steps[hidden].tolist(), values[hidden].tolist(), strict=True):
        places.setdefault(round(_x(step, chart) / 3), []).append((step, value))
    return "".join(
        f'<path class="dots bad{"" if curve.abandoned is None else " left"}" d="M{_x(found[0][0], chart):.1f} 5h0">'
        f"<title>{escape(f'step {found[0][0]:,}: {curve.name} is {found[0][1]}')}{escape(_more(len(found) - 1))}</title></path>"
        for found in places.values()
    )


def _more(count: int) -> str:
    return f", and {count:,} more beside it" if count > 0 else ""


def _grid(scale: _Scale) -> str:
    lines = "".join(f"M0 {_y(value, scale):.1f}H{WIDTH}" for value in scale.ticks())
    return f'<path class="grid" d="{lines}"/><path class="axis" d="M0 {HEIGHT}H{WIDTH}"/>'


def _bands(chart: Chart) -> str:
    if not 1 < len(chart.bands) <= MAX_BANDS:
        return ""
    return "".join(
        f'<rect class="band{" odd" if number % 2 else ""}" x="{_x(band.first_step, chart):.2f}" y="0" height="{HEIGHT}" '
        f'width="{_x(band.stop_step, chart) - _x(band.first_step, chart):.2f}"><title>{escape(band.words)}</title></rect>'
        for number, band in enumerate(chart.bands)
    )


def _level(chart: Chart, scale: _Scale) -> str:
    if chart.level is None:
        return ""
    return f'<path class="level" d="M0 {_y(chart.level[0], scale):.1f}H{WIDTH}"><title>{escape(chart.level[1])}</title></path>'


def _placed(chart: Chart) -> list[tuple[float, list[Mark]]]:
    """Marks grouped by their place on the page: (x in 0..WIDTH, marks), from left to right."""
    places: dict[int, list[Mark]] = {}
    for mark in chart.marks:
        places.setdefault(round(_x(mark.step, chart) / 2.5), []).append(mark)
    return [(_x(found[0].step, chart), found) for _, found in sorted(places.items())]


_GRAVEST = ("rollback", "skip", "restart", "recipe", "defer")


def _marks(chart: Chart) -> str:
    drawn = []
    for x, found in _placed(chart):
        kind = next(kind for kind in _GRAVEST if any(mark.kind == kind for mark in found))
        left = " left" if all(mark.abandoned for mark in found) else ""
        line = f"M{x:.1f} 0V{HEIGHT}"
        drawn.append(
            f'<g class="mark {kind}{left}"><title>{_mark_words(found)}</title><path d="{line}"/><path class="hit" d="{line}"/></g>'
        )
    return "".join(drawn)


def _mark_words(found: Sequence[Mark]) -> str:
    lines = [f"step {mark.step:,}: {mark.words}{' (abandoned)' if mark.abandoned else ''}" for mark in found[:8]]
    return escape("\n".join([*lines, *([f"and {len(found) - 8:,} more"] if len(found) > 8 else [])]))


def _mark_labels(chart: Chart) -> str:
    """Letters over the picture; of two that would overlap, the later is left out, on narrow pages sooner."""
    labels, last, last_wide = [], -math.inf, -math.inf
    for x, found in _placed(chart):
        letters = "".join(letter for kind, letter in _LETTERS.items() if any(mark.kind == kind for mark in found))
        room = 12 + 10 * len(letters)
        if x - last_wide < room:
            continue
        narrow = x - last >= 2.6 * room
        last_wide, last = x, x if narrow else last
        hidden = "" if narrow else ' class="wide"'
        labels.append(f'<span{hidden} style="left:{x / WIDTH:.2%}" title="{_mark_words(found)}">{letters}</span>')
    return f'<div class="letters" aria-hidden="true">{"".join(labels)}</div>'


def _labels(chart: Chart, scale: _Scale) -> str:
    """Tick labels of both axes, and the chunks' names where they have room."""
    up = "".join(
        f'<span style="top:{1 - scale.place(value):.2%}">{escape(chart.show(value))}</span>' for value in scale.ticks()
    )
    steps = [round(step) for step in even_ticks(0, chart.last_step, 6) if step == round(step)]
    across = ""
    for number, step in enumerate(steps):
        kinds = ("wide " if number % 2 else "") + ("end" if step > 0.97 * chart.last_step else "")
        across += f'<span class="{kinds}" style="left:{step / chart.last_step:.2%}">{step:,}</span>'
    names = ""
    if chart.key and 1 < len(chart.bands) <= 24:
        wide = " class=wide" if len(chart.bands) > 10 else ""
        middles = ((band, (band.first_step + band.stop_step) / 2 / chart.last_step) for band in chart.bands)
        names = "".join(f'<span{wide} style="left:{middle:.2%}">{band.chunk}</span>' for band, middle in middles)
        names = f'<div class="chunks" aria-hidden="true">{names}</div>'
    level = ""
    if chart.level is not None:
        value, name = chart.level
        level = f'<div class="over" aria-hidden="true"><span style="top:{1 - scale.place(value):.2%}">{escape(name)}</span></div>'
    return f'<div class="up" aria-hidden="true">{up}</div><div class="across" aria-hidden="true">{across}</div>{names}{level}'


def _legend(chart: Chart) -> str:
    """The curves by name, abandoned ones once, and the letters that occur."""
    shown = [
        f'<li><i class="c{curve.colour}"></i>{escape(curve.name)}</li>'
        for curve in chart.curves
        if curve.abandoned is None
    ]
    if any(curve.abandoned is not None for curve in chart.curves):
        shown.append('<li><i class="left"></i>abandoned, does not count</li>')
    kinds = {mark.kind for mark in chart.marks} if chart.key else set()
    shown += [
        f'<li><b class="key {kind}">{_LETTERS[kind]}</b>{MARK_NAMES[kind]}</li>' for kind in _LETTERS if kind in kinds
    ]
    return f'<ul class="legend">{"".join(shown)}</ul>'


def _described(chart: Chart) -> str:
    """The chart in words, for screen readers."""
    told = []
    for curve in chart.curves:
        steps, values = columns(curve.points)
        shown = drawable(values)
        if curve.abandoned is None and shown.any():
            steps, values = steps[shown], values[shown]
            (first, start), (last, end), (low_step, low), (high_step, high) = (
                (int(steps[place]), float(values[place])) for place in (0, -1, values.argmin(), values.argmax())
            )
            told.append(
                f"{curve.name}: {chart.show(start)} at step {first:,}, {chart.show(end)} at step {last:,}, "
                f"least {chart.show(low)} at step {low_step:,}, greatest {chart.show(high)} at step {high_step:,}"
            )
    kinds: Mapping[str, int] = {kind: sum(mark.kind == kind for mark in chart.marks) for kind in _LETTERS}
    marked = [f"{count} marked {MARK_NAMES[kind]}" for kind, count in kinds.items() if count]
    return f"{chart.title} over completed steps. {'; '.join(told)}.{' ' + ', '.join(marked) + '.' if marked else ''}"


def lanes_html(lanes: Sequence[tuple[str, int, int, int, str]], last_step: int) -> str:
    """Starts as bars over steps, oldest first. lanes: (name, first step, step it counts to, step it reached, words)."""
    rows = []
    for name, first, kept, reached, words in lanes:
        start, middle, end = (min(max(step / last_step, 0.0), 1.0) for step in (first, kept, reached))
        bar = f'<i class="kept" style="left:{start:.2%};width:{middle - start:.2%}"></i>'
        bar += f'<i class="gone" style="left:{middle:.2%};width:{end - middle:.2%}"></i>' if end > middle else ""
        rows.append(f'<li title="{escape(words)}"><span>{escape(name)}</span><div>{bar}</div></li>')
    return f'<ol class="lanes">{"".join(rows)}</ol>'
