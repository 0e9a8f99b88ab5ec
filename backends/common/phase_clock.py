"""Measures how long the parts of a step take."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class PhaseClock:
    """The time between two calls of `to` belongs to the part named by the first. If it is off it does nothing.

    On a CUDA device it records events in the stream and reads them at the end of the step, so the host never waits.
    """

    def __init__(self, device: torch.device, on: bool) -> None:
        self._cuda, self._on = device.type == "cuda", on
        self._marks: list[tuple[str, Any]] = []

    def to(self, part: str) -> None:
        """Begin the part of this name."""
        if self._on:
            self._marks.append((part, self._mark()))

    def stop(self) -> dict[str, float] | None:
        """Part -> ms since the first mark; None where the clock is off."""
        if not self._on:
            return None
        self.to("")
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (part, start), (_, end) in pairwise(self._marks):
            found[part] = found.get(part, 0.0) + (start.elapsed_time(end) if self._cuda else (end - start) * 1e3)
        self._marks = []
        return found

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
