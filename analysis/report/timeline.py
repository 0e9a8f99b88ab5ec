"""A recorded timeline (trace.json of a streaming run): how busy each track was, and a plot, also for TensorBoard.

A slice of the move track includes waiting for the disk ("fetch layers.3" is mostly that). `busy` counts slices as
recorded; `overlap_share` first removes stalls, because computation that waits for a read does not overlap it. A stall
does not say which track waited, so it counts against both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftrain.analysis.figure import new_figure, picture
from weftrain.analysis.tracking.tensorboard import TENSORBOARD
from weftrain.core.errors import WeftrainError, file_problem
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import read_plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRACE = "trace.json"
TRACKS = ("compute", "move", "read", "write", "spool", "stall")
COMPUTING = ("compute", "move")
MOVING = ("read", "write", "spool")
OVERLAP = "overlap_share"
IMAGE_TAG = "streaming/timeline"

COLOURS = {
    "forward": "#4c78a8",
    "loss": "#b279a2",
    "backward": "#f58518",
    "update": "#54a24b",
    "fetch": "#72b7b2",
    "resident": "#9ecae9",
    "free": "#d0d0d0",
    "read": "#2f6f6b",
    "write": "#e0b82c",
    "spool": "#9d755d",
    "other": "#7f7f7f",
    "stall": "red",
}
_LABEL_POINTS = 6.0
_RECORD = "train with the streaming backend and backend.options.trace_steps=3, which records one"

Span = tuple[float, float]


class TimelineError(WeftrainError):
    """A missing or invalid trace file."""


@dataclass(frozen=True)
class Slice:
    """One event of one track, e.g. ("compute", "forward layers.3") or ("read", "layers.3")."""

    track: str
    name: str
    start_ms: float
    duration_ms: float

    @property
    def end_ms(self) -> float:
        return self.start_ms + self.duration_ms

    @property
    def kind(self) -> str:
        """Kind of work, a key of COLOURS: the verb on the compute and move tracks, elsewhere the track."""
        if self.track not in COMPUTING:
            return self.track
        verb = self.name.partition(" ")[0]
        return verb if verb in COLOURS else "other"

    @property
    def record(self) -> str:
        """What was worked on: the name without its verb."""
        verb, _, rest = self.name.partition(" ")
        return rest if rest and self.track in COMPUTING and verb in COLOURS else self.name


def read_trace(path: Path) -> list[Slice]:
    """The slices of a trace, in file order. Raises TimelineError for a missing or invalid trace."""
    try:
        data = read_plain(path, "trace")
    except (FileNotFoundError, NotADirectoryError):
        raise TimelineError(f"{path}: no trace here; {_RECORD}") from None
    except OSError as error:
        raise TimelineError(f"{path}: cannot be read ({file_problem(error)}); mend that, or {_RECORD}") from None
    try:
        trace = parse_json(data)
    except ValueError as error:
        raise TimelineError(f"{path}: not JSON ({error}); {_RECORD}") from None
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list):
        raise TimelineError(f"{path}: no trace: it has no list 'traceEvents'; {_RECORD}")
    tracks: dict[int, str] = {}
    slices: list[Slice] = []
    for number, event in enumerate(events):
        try:
            _read_event(event, tracks, slices)
        except ValueError as error:
            raise TimelineError(f"{path}: traceEvents[{number}]: {error}; {_RECORD}") from None
    return slices


def busy(slices: Sequence[Slice]) -> dict[str, float]:
    """Milliseconds that each track was busy, overlapping slices counted once, and `overlap_share`.

    overlap_share: share of the I/O time during which compute or move was running and not stalled; 1.0 without I/O.
    """
    spans = {track: _union((one.start_ms, one.end_ms) for one in slices if one.track == track) for track in TRACKS}
    computing = _union(span for track in COMPUTING for span in spans[track])
    moving = _union(span for track in MOVING for span in spans[track])
    alone = _length(_without(moving, _without(computing, spans["stall"])))
    found = {track: _length(spans[track]) for track in TRACKS}
    return {**found, OVERLAP: max(0.0, 1 - alone / _length(moving)) if _length(moving) else 1.0}


def draw(slices: Sequence[Slice], path: Path | None = None) -> Figure:
    """The figure: one lane a track, one bar a slice; written too where `path` is given, in its suffix's format.

    Raises DataError without matplotlib.
    """
    figure = new_figure(14, 4.5)
    from matplotlib.patches import Patch

    axes = figure.add_subplot()
    bars: dict[tuple[str, str], list[Span]] = {}
    for one in slices:
        bars.setdefault((one.kind, one.track), []).append((one.start_ms, one.duration_ms))
    for (kind, track), spans in bars.items():
        # The edge keeps a slice visible that is thinner than a pixel.
        axes.broken_barh(
            spans, (TRACKS.index(track) - 0.4, 0.8), facecolor=COLOURS[kind], edgecolor=COLOURS[kind], linewidth=0.3
        )
    axes.set_yticks(range(len(TRACKS)), TRACKS)
    axes.set_ylim(len(TRACKS) - 0.5, -0.5)
    axes.set_xlim(0, max((one.end_ms for one in slices), default=0.0) or 1.0)
    axes.set_xlabel("ms")
    axes.set_title(_title(slices), fontsize="medium")
    drawn = {kind for kind, _ in bars}
    if handles := [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in drawn]:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    _label(figure, axes, slices)
    if path is not None:
        fsops.write_bytes(path, picture(figure, path.suffix))
    return figure


def add_to_tensorboard(figure: Figure, folder: Path) -> None:
    """Add the figure to TensorBoard's files of the run folder `folder`, as the image `streaming/timeline`."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and wanted only here

    fsops.make_dirs(folder / TENSORBOARD)
    with SummaryWriter(str(folder / TENSORBOARD)) as board:  # type: ignore[no-untyped-call]
        board.add_figure(IMAGE_TAG, figure, global_step=0, close=False)


def _read_event(event: Any, tracks: dict[int, str], slices: list[Slice]) -> None:
    """Add one event to `tracks` (number -> name) or `slices`. Raises ValueError for other events."""
    if not isinstance(event, dict):
        raise ValueError("not an object")
    thread, name = event.get("tid"), event.get("name")
    if type(thread) is not int:
        raise ValueError("'tid' is not a whole number")
    if event.get("ph") == "M" and name == "thread_name":
        arguments = event.get("args")
        track = arguments.get("name") if isinstance(arguments, dict) else None
        if track not in TRACKS or track in tracks.values() or thread in tracks:
            raise ValueError(f"names track {thread} {track!r}, which is none of {', '.join(TRACKS)} or named twice")
        tracks[thread] = track
        return
    if event.get("ph") != "X":
        raise ValueError(f"'ph' is {event.get('ph')!r}, neither a slice (X) nor the name of a track (M)")
    if thread not in tracks:
        raise ValueError(f"lies on track {thread}, which no event before it names")
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError("'name' is not a printable text")
    slices.append(Slice(tracks[thread], name, _milliseconds(event, "ts"), _milliseconds(event, "dur")))


def _milliseconds(event: dict[str, Any], key: str) -> float:
    value = event.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"'{key}' is not a number")
    try:
        microseconds = float(value)
    except OverflowError:
        microseconds = math.inf
    if not (math.isfinite(microseconds) and microseconds >= 0):
        raise ValueError(f"'{key}' is {microseconds}, not a finite number from 0 on")
    return microseconds / 1e3


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same time as sorted spans that do not touch."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _without(spans: Sequence[Span], holes: Sequence[Span]) -> list[Span]:
    """The parts of `spans` outside `holes`; both as from `_union`."""
    left: list[Span] = []
    first = 0
    for start, end in spans:
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        index = first
        while index < len(holes) and holes[index][0] < end:
            if start < holes[index][0]:
                left.append((start, holes[index][0]))
            start = max(start, holes[index][1])
            index += 1
        if start < end:
            left.append((start, end))
    return left


def _length(spans: Sequence[Span]) -> float:
    return math.fsum(end - start for start, end in spans)


def _title(slices: Sequence[Slice]) -> str:
    figures = busy(slices)
    times = ", ".join(f"{track} {figures[track]:,.1f}" for track in TRACKS)
    moved = any(figures[track] for track in MOVING)
    return f"busy ms: {times}; " + (f"{figures[OVERLAP]:.0%} of the I/O under computation" if moved else "no I/O")


def _label(figure: Figure, axes: Axes, slices: Sequence[Slice]) -> None:
    """Write the record into every bar with enough room, which is known after the layout."""
    figure.draw_without_rendering()
    points_per_ms = axes.bbox.width * 72 / figure.dpi / axes.get_xlim()[1]
    for one in slices:
        if one.duration_ms * points_per_ms < 0.65 * _LABEL_POINTS * (len(one.record) + 1):
            continue
        middle = one.start_ms + one.duration_ms / 2
        style: dict[str, Any] = {
            "fontsize": _LABEL_POINTS,
            "ha": "center",
            "va": "center",
            "clip_on": True,
            "parse_math": False,
        }
        axes.text(middle, TRACKS.index(one.track), one.record, **style).set_in_layout(False)
