"""The pictures of `numbers.py`: panels of lines and matrices, in colours that colour-blind readers tell apart.

The same numbers give the same bytes, in SVG and PDF too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weftrain.analysis.compare.plot import COLOURS
from weftrain.analysis.figure import new_figure, picture
from weftrain.analysis.figures.numbers import Matrix, Panel, PaperFigure
from weftrain.core.formats import fsops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_PANEL_INCHES = (5.6, 3.6)
_LOGARITHMIC_FROM = 50.0  # last over first position
_MOST_NUMBERS = 12  # rows of a matrix up to which its cells say their values
_SMALLEST_PERCENT = 0.1  # the logarithm of percentages begins here; what is below is drawn in proportion


def build(figure: PaperFigure) -> Figure:
    """The matplotlib figure. Raises NoMatplotlibError (a DataError)."""
    count = len(figure.panels) + len(figure.matrices)
    columns = min(2, count)
    rows = math.ceil(count / columns)
    wide = _PANEL_INCHES[0] * (1.4 if count == 1 else columns)
    height = _PANEL_INCHES[1] * (1.3 if figure.matrices or count == 1 else 1.0) * rows
    made = new_figure(wide, height)
    axes = made.subplots(rows, columns, squeeze=False).flatten()
    for place, panel in zip(axes, figure.panels, strict=False):
        _lines(place, panel)
    images = [_matrix(place, matrix) for place, matrix in zip(axes, figure.matrices, strict=False)]
    if images:
        made.colorbar(images[0], ax=list(axes), label="Pearson's correlation")
    for place in axes[count:]:
        place.set_axis_off()
    made.suptitle("\n".join((figure.title, *figure.notes)), fontsize=11)
    return made


def write(figures: Sequence[PaperFigure], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write each figure in each format ("png", "svg", "pdf") into `folder`, which exists; their paths."""
    paths = []
    for figure in figures:
        made = build(figure)
        for kind in formats:
            path = folder / f"{figure.name}.{kind}"
            fsops.write_bytes(path, picture(made, f".{kind}"))
            paths.append(path)
    return paths


def _lines(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        axes.plot(
            *zip(*line.points, strict=True),
            label=line.label,
            color=_colour(line.colour, len(panel.lines)),
            marker=_MARKERS[line.colour % len(_MARKERS)],
            markersize=4,
            linewidth=1.3,
            clip_on=False,  # else half of what lies on an axis is cut off
        )
    positions = [x for line in panel.lines for x, _ in line.points]
    if min(positions) > 0 and max(positions) / min(positions) > _LOGARITHMIC_FROM:
        axes.set_xscale("log")
    if panel.symmetric_log:
        axes.set_yscale("symlog", linthresh=_SMALLEST_PERCENT)
        axes.set_ylim(bottom=0)
    elif panel.bottom_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(panel.y_label, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _colour(index: int, count: int) -> str:
    """Okabe and Ito's for a few lines; of more, a scale from dark to light that grey print keeps."""
    if count <= len(COLOURS):
        return COLOURS[index % len(COLOURS)]
    import matplotlib

    red, green, blue, _ = matplotlib.colormaps["viridis"](0.9 * index / (count - 1))
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _matrix(axes: Axes, matrix: Matrix) -> AxesImage:
    """Checkpoint x checkpoint; grey where undefined. Its image."""
    values = np.array([[np.nan if one is None else one for one in row] for row in matrix.values], dtype=np.float64)
    axes.set_facecolor("lightgrey")
    image = axes.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1)
    if len(values) <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    every = max(1, math.ceil(len(matrix.labels) / 20))
    places = range(0, len(matrix.labels), every)
    axes.set_xticks(places, matrix.labels[::every], rotation=60, fontsize=8)
    axes.set_yticks(places, matrix.labels[::every], fontsize=8)
    axes.set_title(matrix.title, fontsize=10)
    axes.set_xlabel("step of the checkpoint", fontsize=9)
    axes.set_ylabel("step of the checkpoint", fontsize=9)
    return image
