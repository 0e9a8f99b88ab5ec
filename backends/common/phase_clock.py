"""Measures how long a step and its parts take, without a wait of its own on a CUDA device."""

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
            self._marks.append((part, _mark(self._cuda)))

    def stop(self) -> dict[str, float] | None:
        """Part -> ms since the first mark; None where the clock is off."""
        if not self._on:
            return None
        self.to("")
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (part, start), (_, end) in pairwise(self._marks):
            found[part] = found.get(part, 0.0) + _ms(start, end)
        self._marks = []
        return found


class StepClock:
    """How long each step takes, without what happens between two steps (log lines, evaluation, saving).

    On a CPU from `begin` to `end`. On a CUDA device the host is ahead of the update when it reaches `end`, so a step is
    counted from result to result by events in the stream: the update of the step before, and this step up to its loss
    and norm. The update of a run's last step is in no step's time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin: Any = None
        self._result: Any = None
        self._before: tuple[Any, Any] | None = None  # result and end of the step before

    def begin(self) -> None:
        """The step begins: its rows are asked for next."""
        self._begin = _mark(self._cuda)

    def result(self) -> None:
        """Loss and norm are computed, and the host waits for them next."""
        if self._cuda:
            self._result = _mark(True)

    def end(self) -> float:
        """The step's time in ms. Called after the host has waited for the result, and after the update was launched."""
        end = _mark(self._cuda)
        if not self._cuda:
            return _ms(self._begin, end)
        update_ms = 0.0 if self._before is None else _ms(*self._before)
        self._before = (self._result, end)
        return update_ms + _ms(self._begin, self._result)


def _mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(start: Any, end: Any) -> float:
    """Between two marks: events that have both happened, or moments of the host."""
    return (end - start) * 1e3 if isinstance(start, float) else float(start.elapsed_time(end))
