"""A timeline of the first steps in the Chrome trace format: chrome://tracing and https://ui.perfetto.dev open it.

One track for each kind of work: `compute`; `move` (loads and updates, with waiting); `read`, `write` and `spool` of the
disk; `stall`, where the engine waited. One slice for each event, named by its kind and record.
"""

from __future__ import annotations

import json
from pathlib import Path

from weftrain.core.formats import fsops

TRACKS = ("compute", "move", "read", "write", "spool", "stall")


class Trace:
    """Collects slices from any thread: a list's append is atomic."""

    def __init__(self) -> None:
        self._slices: list[tuple[str, str, float, float]] = []

    def __call__(self, track: str, name: str, start_s: float, end_s: float) -> None:
        self._slices.append((track, name, start_s, end_s))

    def save(self, path: Path) -> None:
        """Write all slices, in microseconds from the first one on."""
        slices = sorted(self._slices, key=lambda item: item[2])
        first = slices[0][2] if slices else 0.0
        events: list[dict[str, object]] = [
            {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}}
            for number, track in enumerate(TRACKS)
        ]
        for track, name, start, end in slices:
            times = {"ts": round((start - first) * 1e6, 1), "dur": round((end - start) * 1e6, 1)}
            events.append({"ph": "X", "pid": 1, "tid": TRACKS.index(track), "name": name, "cat": track, **times})
        fsops.write_bytes(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())
