"""The picture of a comparison: loss, scores and memorization over tokens seen, a colour a series.

What a reader would get wrong: a line between two markers is drawn for the eye. Only the train loss is a curve, and it is smoothed over the
window that its label states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weftrain.analysis.compare import Comparison, headings, plain
from weftrain.analysis.compare_series import Column, Series
from weftrain.core.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart by colour-blind readers; without yellow, too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")
_LOGARITHMIC_FROM = 50  # last over first position
_MAX_CURVE_POINTS = 4000


def check_plotting() -> None:
    """Raises DataError without matplotlib, before anything is computed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise DataError("matplotlib is not installed, which draws the picture; pip install 'weftrain[plot]', or give --no-plot") from None


def plot(comparison: Comparison, path: Path) -> None:
    """Write the picture; its format is the suffix's (.png, .svg). Raises DataError without matplotlib."""
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 12), layout="constrained")
    FigureCanvasAgg(figure)
    named = dict(zip(comparison.columns, headings(comparison.columns), strict=True))
    panels = ((("held-out loss",), "loss, nats per token"), (("score",), "score"), (("memorization",), "memorization"))
    axes = figure.subplots(3, 1)
    for place, (kinds, label) in zip(axes, panels, strict=True):
        chosen = {column: heading for column, heading in named.items() if column.kind in kinds}
        if kinds == ("held-out loss",):
            _curves(place, comparison)
        _measured(place, comparison.series, chosen, label)
        place.set_xlabel("tokens seen")
        if not place.lines:
            place.text(0.5, 0.5, "none recorded", ha="center", va="center", transform=place.transAxes)
            place.set_xticks([])
            place.set_yticks([])
            continue
        if _spread(place) > _LOGARITHMIC_FROM:
            place.set_xscale("log")
        place.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside the panel: it may be long
    figure.savefig(path, dpi=150)


def _curves(axes: Axes, comparison: Comparison) -> None:
    for index, one in enumerate(comparison.series):
        if one.curve:
            thinned = one.curve[:: max(1, len(one.curve) // _MAX_CURVE_POINTS)]
            label = f"{plain(one.name)}: train loss, mean of {comparison.window_steps:,} steps"
            axes.plot(*zip(*thinned, strict=True), color=_colour(index), linewidth=1, alpha=0.7, label=label)


def _measured(axes: Axes, series: Sequence[Series], columns: Mapping[Column, str], label: str) -> None:
    """Percents against the left axis; what is none, of scores and memorization, as 100 times itself where it is a mean score of 0..1."""
    axes.set_ylabel(f"{label}, %" if any(column.measure.endswith("%") for column in columns) else label)
    for index, one in enumerate(series):
        for number, (column, heading) in enumerate(columns.items()):
            factor = 100.0 if column.measure == "mean score" else 1.0
            points = [
                (point.tokens, factor * point.values[column])
                for point in one.points
                if column in point.values and math.isfinite(point.values[column])
            ]
            if points:
                style: dict[str, Any] = {"color": _colour(index), "linestyle": _LINES[number % len(_LINES)], "linewidth": 1}
                style |= {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
                text = f"{plain(one.name)}: {heading}" + (" x 100" if factor != 1 else "")
                axes.plot(*zip(*points, strict=True), label=text, **style)


def _spread(axes: Axes) -> float:
    values = np.concatenate([np.asarray(line.get_xdata(), dtype=np.float64) for line in axes.lines])
    return float(values.max() / values.min()) if values.min() > 0 else 1.0  # a logarithm has no place for a checkpoint of step 0


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
