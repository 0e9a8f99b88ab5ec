"""A run whose steps take as long as a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from weftrain.core.backend import StepResult
from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]


class Clock:
    """Seconds of an invented clock."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class InventedRun:
    """Steps that take given ms: forward 5, backward 3 of them each, 1 beside the parts, and `gap_ms` outside of the
    backend.
    """

    def __init__(self, clock: Clock, ms: list[float], gap_ms: float = 0.5) -> None:
        self.clock, self.ms, self.gap_ms = clock, ms, gap_ms

    def train(self, source: Any) -> Iterator[StepResult]:
        for step, ms in enumerate(self.ms):
            self.clock.now += ms / 1e3
            phases = {"data wait": 0.25, "forward": 5.0, "backward": 3.0, "update": ms - 9.25}
            yield StepResult(step, 5.0 - step / 10, 1.0, {}, 52, 52, ms, 0.25, phases_ms=phases)
            self.clock.now += self.gap_ms / 1e3

    def stats(self) -> dict[str, float]:
        return {"memory_bytes": 7.0}
