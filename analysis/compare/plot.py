"""The plot of a comparison: loss, scores and memorization over tokens seen, one colour a series.

Lines between markers only guide the eye; the train loss alone is a curve, smoothed over the window in its label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weftrain.analysis.compare.series import KINDS, MeasureColumn, Series
from weftrain.analysis.compare.table import Comparison, headings, plain, train_loss_words
from weftrain.analysis.figure import new_figure, picture
from weftrain.core.formats import fsops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart by colour-blind readers; without yellow, too
# pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")
_LOGARITHMIC_FROM = 50  # last over first position
_MAX_CURVE_POINTS = 4000


def plot(comparison: Comparison, path: Path) -> bool:
    """Write one panel for each kind of measure; False, and no file, where there is nothing to draw.

    The path's suffix sets the format (.png, .svg). Raises DataError without matplotlib.
    """
    named = dict(zip(comparison.columns, headings(comparison.columns, comparison.window_steps), strict=True))
    panels = []
    for kind, label in ((kind, about.axis) for kind, about in KINDS.items() if about.axis):
        chosen = {column: heading for column, heading in named.items() if column.kind == kind}
        with_curves = kind == "held-out loss" and any(len(one.curve) > 1 for one in comparison.series)
        if with_curves or any(_finite(one, column) for one in comparison.series for column in chosen):
            panels.append((chosen, label, with_curves))
    if not panels:
        return False
    figure = new_figure(12, 4 * len(panels))
    for place, (chosen, label, with_curves) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
    ):
        if with_curves:
            _curves(place, comparison)
        _measured(place, comparison.series, chosen, label)
        place.set_xlabel("tokens seen")
        if _spread(place) > _LOGARITHMIC_FROM:
            place.set_xscale("log")
        # beside the panel: it may be long
        place.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    fsops.write_bytes(path, picture(figure, path.suffix))
    return True


def _finite(series: Series, column: MeasureColumn) -> list[tuple[int, float]]:
    """(tokens, value) of a column's finite values."""
    return [
        (one.tokens, one.values[column])
        for one in series.points
        if column in one.values and math.isfinite(one.values[column])
    ]


def _curves(axes: Axes, comparison: Comparison) -> None:
    for index, one in enumerate(comparison.series):
        if one.curve:
            thinned = one.curve[:: max(1, len(one.curve) // _MAX_CURVE_POINTS)]
            label = f"{plain(one.name)}: {train_loss_words(comparison.window_steps)}"
            axes.plot(*zip(*thinned, strict=True), color=_colour(index), linewidth=1, alpha=0.7, label=label)


def _measured(axes: Axes, series: Sequence[Series], columns: Mapping[MeasureColumn, str], label: str) -> None:
    """Plot percentages as they are, and mean scores of 0..1 times 100."""
    axes.set_ylabel(f"{label}, %" if any(column.measure.endswith("%") for column in columns) else label)
    for index, one in enumerate(series):
        for number, (column, heading) in enumerate(columns.items()):
            factor = 100.0 if column.measure == "mean score" else 1.0
            points = [(tokens, factor * value) for tokens, value in _finite(one, column)]
            if points:
                style: dict[str, Any] = {
                    "color": _colour(index),
                    "linestyle": _LINES[number % len(_LINES)],
                    "linewidth": 1,
                }
                style |= {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
                text = f"{plain(one.name)}: {heading}" + (" x 100" if factor != 1 else "")
                axes.plot(*zip(*points, strict=True), label=text, **style)


def _spread(axes: Axes) -> float:
    values = np.concatenate([np.asarray(line.get_xdata(), dtype=np.float64) for line in axes.lines])
    # a logarithm has no place for a checkpoint of step 0
    return float(values.max() / values.min()) if values.min() > 0 else 1.0


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
