"""A simulated step as a picture: an HTML page by itself, or a trace that Perfetto and chrome://tracing open.

One row for the computation of each pipeline stage's device and one for each of its links, then its memory over time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from weftrain.analysis.markup import document, escape
from weftrain.core.formats.units import gib

_WIDTH, _LEFT, _ROW, _GAP, _MEMORY = 1200.0, 190.0, 22.0, 6.0, 60.0
_LEAST = 0.3  # pixels: narrower bars of one colour that touch are drawn as one
# colours that are told apart without red and green (Okabe and Ito)
COLOURS = {
    "forward": "#56b4e9",
    "backward": "#0072b2",
    "weights": "#009e73",
    "optimizer": "#cc79a7",
    "copy": "#999999",
    "gather": "#e69f00",
    "scatter": "#d55e00",
    "sum": "#f0e442",
    "tokens": "#e69f00",
    "send": "#999999",
}
_MEANINGS = {
    "forward": "forward",
    "backward": "backward",
    "weights": "gradients of weights",
    "optimizer": "optimizer",
    "copy": "copies of weights and gradients; sends to another stage",
    "gather": "gather weights; tokens between tensor or context ranks",
    "scatter": "scatter gradients",
    "sum": "sum gradients over replicas",
}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em;max-width:1240px}svg{width:100%;height:auto}"
    "text{font:12px system-ui,sans-serif}table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;"
    "text-align:left;vertical-align:top}td.number{text-align:right}i{display:inline-block;width:.9em;height:.9em}"
)


class Slice(NamedTuple):
    """One piece of work; its name begins with a key of COLOURS."""

    name: str
    start_s: float
    end_s: float


class Row(NamedTuple):
    """The slices of one stream of one device, in order. The stream that computes comes first among a device's."""

    device: int
    stream: str
    slices: Sequence[Slice]


class Picture(NamedTuple):
    """memory: of each device, (seconds, bytes from then on)."""

    rows: Sequence[Row]
    memory: Sequence[Sequence[tuple[float, int]]]


def trace(found: Picture) -> bytes:
    """Chrome's trace format: a process a device, a thread a stream, a counter of memory. Times in microseconds."""
    events: list[dict[str, object]] = []
    for device in range(len(found.memory)):
        named = {"name": f"device of stage {device}"}
        events.append({"ph": "M", "pid": device, "name": "process_name", "args": named})
    for number, row in enumerate(found.rows):
        place = {"pid": row.device, "tid": number}
        events.append({"ph": "M", **place, "name": "thread_name", "args": {"name": row.stream}})
        for one in row.slices:
            times = {"ts": round(one.start_s * 1e6, 3), "dur": round((one.end_s - one.start_s) * 1e6, 3)}
            events.append({"ph": "X", **place, "name": one.name, "cat": row.stream, **times})
    for device, curve in enumerate(found.memory):
        for at, size in curve:
            held = {"bytes": size}
            events.append({"ph": "C", "pid": device, "name": "memory", "ts": round(at * 1e6, 3), "args": held})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()


def page(found: Picture, title: str, facts: Sequence[tuple[str, str]], assumptions: Sequence[str]) -> str:
    """facts: what is printed above the picture. assumptions: sentences below it."""
    told = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    keys = "".join(
        f'<span><i style="background:{COLOURS[name]}"></i> {escape(meaning)} </span>'
        for name, meaning in _MEANINGS.items()
    )
    listed = "".join(f"<li>{escape(line)}</li>" for line in assumptions)
    body = (
        f"<h1>{escape(title)}</h1><table>{told}</table><p>{keys}</p>{_drawing(found)}<h2>Assumed</h2><ul>{listed}</ul>"
    )
    return document(title, _STYLE, body)


def _drawing(found: Picture) -> str:
    end_s = max(one.end_s for row in found.rows for one in row.slices)
    parts: list[str] = []
    at = 0.0
    for device, of_device in groupby(found.rows, key=lambda row: row.device):
        for number, row in enumerate(of_device):
            called = f"stage {device}" if number == 0 else row.stream
            parts.append(f'<text x="0" y="{at + 15:.0f}">{escape(called)}</text>')
            parts += _bars(row, at, end_s)
            at += _ROW
        parts += _curve(found.memory[device], at, end_s)
        at += _MEMORY + _GAP
    ticks = "".join(_tick(share, end_s, at) for share in (0, 0.25, 0.5, 0.75, 1))
    return (
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + 60:.0f} {at + 24:.0f}" role="img" '
        f'aria-label="Timeline of a simulated step">{"".join(parts)}{ticks}</svg>'
    )


def _bars(row: Row, at: float, end_s: float) -> Iterator[str]:
    scale = _WIDTH / end_s
    for start, end, kind, name in _merged(row, scale):
        yield (
            f'<rect x="{_LEFT + start:.2f}" y="{at:.0f}" width="{max(end - start, _LEAST):.2f}" '
            f'height="{_ROW - 3:.0f}" fill="{COLOURS[kind]}"><title>{escape(name)}</title></rect>'
        )


def _merged(row: Row, scale: float) -> Iterator[tuple[float, float, str, str]]:
    """Start and end in pixels, colour and name; neighbours of one colour that no pixel parts are one bar."""
    held: tuple[float, float, str, str] | None = None
    for one in row.slices:
        kind = one.name.partition(" ")[0]
        start, end = one.start_s * scale, one.end_s * scale
        if held is not None and held[2] == kind and start - held[1] < _LEAST and end - held[0] < 4:
            held = (held[0], end, kind, f"{held[3].partition(' to ')[0]} to {one.name}")
            continue
        if held is not None:
            yield held
        held = (start, end, kind, one.name)
    if held is not None:
        yield held


def _curve(memory: Sequence[tuple[float, int]], at: float, end_s: float) -> list[str]:
    """Memory over time as steps, scaled to its peak."""
    most, scale, height = max(size for _, size in memory), _WIDTH / end_s, _MEMORY - 6
    points: list[str] = []
    before, left = 0.0, -1.0
    for seconds, size in memory:
        across, down = _LEFT + seconds * scale, at + height * (1 - size / most)
        if across - left >= _LEAST:
            points += [f"{across:.1f},{before:.1f}"] if points else []
            points.append(f"{across:.1f},{down:.1f}")
            before, left = down, across
    points.append(f"{_LEFT + _WIDTH:.1f},{before:.1f}")
    return [
        f'<text x="0" y="{at + 15:.0f}">memory, {escape(gib(most))} at most</text>',
        f'<polyline points="{" ".join(points)}" fill="none" stroke="#333" stroke-width="1"/>',
    ]


def _tick(share: float, end_s: float, at: float) -> str:
    across = _LEFT + share * _WIDTH
    return f'<text x="{across:.0f}" y="{at + 16:.0f}" text-anchor="middle">{share * end_s * 1e3:,.1f} ms</text>'
