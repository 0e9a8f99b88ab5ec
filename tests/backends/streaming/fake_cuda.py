"""CUDA streams and events that only keep time: a copy is made at once, and its stream's clock says what it would have
waited for on a GPU. `Watch` notes each access to a piece of memory, and refuses two that nothing orders.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import pytest
import torch

from weftrain.backends.streaming import device as device_module
from weftrain.backends.streaming.device import CudaCopies

Clock = dict[int, int]


def merge(into: Clock, other: Clock) -> None:
    for key, value in other.items():
        into[key] = max(into.get(key, 0), value)


class Stream:
    """A queue of work: what is launched into it comes after all that the host knew, and all that it waited for."""

    numbers = itertools.count()

    def __init__(self, *_: Any) -> None:
        self.number, self.clock = next(self.numbers), Clock()

    def wait_event(self, event: Event) -> None:
        merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        merge(self.clock, other.clock)

    def synchronize(self) -> None:
        merge(Watch.now.host, self.clock)


class Event:
    def __init__(self) -> None:
        self.clock = Clock()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or Watch.now.current).clock)

    def synchronize(self) -> None:
        merge(Watch.now.host, self.clock)


class Entered:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before, Watch.now.current = Watch.now.current, self.stream

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        Watch.now.current = self.before


class Watch:
    now: Watch

    def __init__(self) -> None:
        Watch.now = self
        self.host: Clock = {}
        self.current = Stream()  # where computation is launched
        self.accesses: dict[Any, list[tuple[bool, int, int, str]]] = {}
        self.races: list[str] = []

    def access(self, memory: Any, what: str, *, write: bool, on_host: bool = False) -> None:
        clock = self.host if on_host else self.current.clock
        number = -1 if on_host else self.current.number
        if not on_host:
            merge(clock, self.host)
        for written, other, time, name in self.accesses.setdefault(memory, []):
            if (write or written) and clock.get(other, 0) < time:
                self.races.append(f"{memory}: {what} does not wait for {name}")
        clock[number] = clock.get(number, 0) + 1
        if write:
            self.accesses[memory] = []
        self.accesses[memory].append((write, number, clock[number], what))


class WatchedCopies(CudaCopies):
    """Copies of an executor: notes what each reads and writes."""

    @contextlib.contextmanager
    def copying(self, slot: int) -> Iterator[None]:
        with super().copying(slot):
            Watch.now.access(("host memory of slot", slot), "copy to the device", write=False)
            Watch.now.access(("slot", slot), "copy to the device", write=True)
            yield

    @contextlib.contextmanager
    def leaving(self, gradients: Any) -> Iterator[None]:
        for name in gradients:
            Watch.now.access(("gradient", name), "backward", write=True)
        with super().leaving(gradients):
            for name in gradients:
                Watch.now.access(("gradient", name), "copy to the host", write=False)
                Watch.now.access(("gradient on the host", name), "copy to the host", write=True)
            yield

    def to_host(self, gradients: Any, write: Callable[[Any], None]) -> None:
        def read(found: Any) -> None:
            for name in found:
                Watch.now.access(("gradient on the host", name), "write to the store", write=False, on_host=True)
            write(found)

        super().to_host(gradients, read)


def use(patch: pytest.MonkeyPatch) -> Watch:
    """Have runs that are prepared from now on make their copies as if the CPU were a GPU."""
    watch = Watch()
    for name, fake in (("Stream", Stream), ("Event", Event), ("stream", Entered)):
        patch.setattr(torch.cuda, name, fake)
    patch.setattr(torch.cuda, "current_stream", lambda *_: Watch.now.current)
    patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    patch.setattr(device_module, "register", lambda *_: None)
    patch.setattr(device_module, "unregister", lambda *_: None)
    from weftrain.backends.streaming import executor

    patch.setattr(executor, "Copies", lambda: WatchedCopies(torch.device("cpu")))
    return watch


def watch_run(run: Any, watch: Watch, patch: pytest.MonkeyPatch) -> None:
    """Note what the computation, the store and the updates of a run access."""
    from weftrain.backends.streaming import passes

    slots, compute, prefetch = run.executor._scheduler.slots, passes.Pass.__call__, run.store.prefetch
    update, placement = run.executor._update_record, run.executor.placement

    def computing(self: Any, event: Any) -> None:
        if event.kind in ("forward", "loss", "backward") and event.record.index not in placement.states:
            watch.access(("slot", slots.number(event.record)), f"{event}", write=False)
        compute(self, event)

    def request(record: Any, slot: Any, with_state: bool) -> None:
        watch.access(("host memory of slot", slots.number(record)), f"read {record.name}", write=True, on_host=True)
        prefetch(record, slot, with_state)

    def updating(record: Any) -> None:
        for spec in record.specs if run.store.tier == "ram" and record.index not in placement.states else ():
            watch.access(("gradient on the host", spec.name), "update", write=False, on_host=True)
        update(record)

    patch.setattr(passes.Pass, "__call__", computing)
    if run.store.tier == "direct":
        patch.setattr(run.store, "prefetch", request)
    run.executor._updates._update = updating
