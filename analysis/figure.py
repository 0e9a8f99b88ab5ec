"""Matplotlib figures without pyplot, which keeps global state and may want a display."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weftrain.core.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NoMatplotlibError(DataError):
    """matplotlib is not installed. A verb keeps its other work and says that it drew nothing (cli/display.drawing)."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches. Raises NoMatplotlibError."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it makes do without a home folder, and tells so at length
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NoMatplotlibError("nothing is drawn without matplotlib: pip install 'weftrain[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextlib.contextmanager
def colours(dark: bool) -> Iterator[None]:
    """Figures that are made within are for a dark page or for a light one. Raises NoMatplotlibError."""
    new_figure(1, 1)
    import matplotlib.style

    with matplotlib.style.context("dark_background" if dark else "default"):
        yield


def picture(figure: Figure, suffix: str = ".png", dpi: int = 150) -> bytes:
    """The figure as a file's content: the same figure, the same bytes. Write it with fsops: matplotlib would follow a
    link of the file's name.
    """
    import matplotlib

    data, kind = io.BytesIO(), suffix.removeprefix(".") or "png"
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "weftrain"}):  # else the ids of an SVG's parts are random
        figure.savefig(data, format=kind, dpi=dpi, metadata=undated)
    return data.getvalue()
