"""Matplotlib figures without pyplot, which keeps global state and may want a display."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weftrain.core.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches. Raises DataError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("matplotlib is not installed, which draws plots: pip install 'weftrain[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextlib.contextmanager
def colours(dark: bool) -> Iterator[None]:
    """Figures that are made within are for a dark page or for a light one. Raises DataError without matplotlib."""
    new_figure(1, 1)
    import matplotlib.style

    with matplotlib.style.context("dark_background" if dark else "default"):
        yield


def picture(figure: Figure, suffix: str = ".png", dpi: int = 150) -> bytes:
    """The figure as a file's content. Write it with fsops: matplotlib would follow a link of the file's name."""
    data = io.BytesIO()
    figure.savefig(data, format=suffix.removeprefix(".") or "png", dpi=dpi)
    return data.getvalue()
