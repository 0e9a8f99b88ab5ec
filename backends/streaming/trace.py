"""A timeline of the first steps in the Chrome trace format: chrome://tracing and https://ui.perfetto.dev open it.

One process, one track a kind of work: what the engine computes, what it moves or updates (with the waiting for it),
what the disk reads and writes meanwhile, and `stall`, where the engine waited. One slice an event, named by what was
done to which record.
"""

from __future__ import annotations

import json
from pathlib import Path

from weftrain.core.formats import fsops

TRACKS = ("compute", "move", "read", "write", "spool", "stall")


class Trace:
    """Collects slices from any thread; a list's append is atomic."""

    def __init__(self) -> None:
        self._slices: list[tuple[str, str, float, float]] = []

    def __call__(self, track: str, name: str, start_s: float, end_s: float) -> None:
        self._slices.append((track, name, start_s, end_s))

    def save(self, path: Path) -> None:
        """Write what was collected; microseconds from the first slice on."""
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
