"""A CUDA device that exists in time alone: streams with queues, events and a host whose clock moves only when told.

A launch costs the host `launch_ms` and joins the queue of the current stream; an event happens when its stream has
come to it. `install` puts it in place of the parts of torch.cuda that measuring uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

CYCLES_PER_MS = 2_000_000


class SimulatedCuda:
    def __init__(self, launch_ms: float = 0.01) -> None:
        self.now, self.launch_ms = 0.0, launch_ms  # of the host, in ms
        self.free_at: dict[str, float] = {"main": 0.0}  # stream -> when its queue is empty
        self.current = "main"
        self.waits = 0  # of the host for the device
        self.log: list[str] = []

    def host(self, ms: float) -> None:
        """The host works by itself."""
        self.now += ms

    def launch(self, ms: float, name: str = "kernel") -> None:
        """Work for the current stream."""
        self.host(self.launch_ms)
        self.free_at[self.current] = max(self.now, self.free_at.setdefault(self.current, 0.0)) + ms
        self.log.append(name)

    def synchronize(self, *_: Any) -> None:
        self.waits += 1
        self.now = max(self.now, *self.free_at.values())

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at: float | None = None

            def record(self, stream: Any = None) -> None:
                self.at = max(device.now, device.free_at[device.current])

            def elapsed_time(self, end: Any) -> float:
                assert None not in (self.at, end.at), "an event that was never recorded"
                assert max(self.at, end.at) <= device.now, "an event that has not happened: torch raises here"
                return end.at - self.at

            def query(self) -> bool:
                return self.at is not None and self.at <= device.now

            def synchronize(self) -> None:
                assert self.at is not None
                device.now = max(device.now, self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / CYCLES_PER_MS, "wait"))
        monkeypatch.setattr("weftrain.kernels.bench.clocks._NOW", lambda: self.now / 1e3)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
