"""Clocks for one sample: elapsed time on a CPU; on a CUDA device the device's own time, apart from that of launching.

A sample is new inputs, then one part or several that follow each other (forward, backward), then a look at what they
returned. On a CUDA device all of it is queued behind a wait that the device spends spinning: when the host is done
before the wait is over, no gap between two launches can be in the time, and the time that the host needed is known
apart. The inputs are written after the wait, in the stream that the call is made in, so work on another stream can
neither begin early nor be left out.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

# What a kernel could replace to look fast is bound when this module is imported.
_NOW, _PROCESSOR_TIME = time.perf_counter, time.process_time
_FIRST_WAIT = 2_000_000  # cycles: about a millisecond
_LONGEST_WAIT = 2_000_000_000
_PERSISTING_L2_LIMIT = 6  # CU_LIMIT_PERSISTING_L2_CACHE_SIZE of the driver's API


@dataclass(frozen=True)
class Sample:
    """One sample. Where the clock cannot tell, None."""

    parts_ms: tuple[float, ...]
    launch_ms: float | None = None  # of the host, for all parts, while the device was kept waiting
    late_ms: float = 0.0  # how long the device went on after the stream that was called on was done
    processor_ms: float | None = None  # of all threads of this process
    gaps: bool = False  # the device ran before the host had launched everything: gaps between launches count

    @property
    def ms(self) -> float:
        return sum(self.parts_ms)


class Clock(Protocol):
    """prepare writes new inputs, outside of the time; parts are timed one by one; after is called when they have been
    launched, before anything is waited for. A clock that tries again prepares again.
    """

    def __call__(
        self, prepare: Callable[[], None], parts: Sequence[Callable[[], Any]], after: Callable[[], None]
    ) -> Sample: ...


def wall_clock(prepare: Callable[[], None], parts: Sequence[Callable[[], Any]], after: Callable[[], None]) -> Sample:
    """For a CPU: elapsed time."""
    prepare()
    processor, marks = _PROCESSOR_TIME(), [_NOW()]
    for part in parts:
        part()
        marks.append(_NOW())
    spent = (_PROCESSOR_TIME() - processor) * 1e3
    after()
    times = tuple((end - start) * 1e3 for start, end in pairwise(marks))
    return Sample(times, processor_ms=spent)


class StreamClock:
    """For CUDA: time between events in the stream, behind a wait, after twice the L2 cache was overwritten and its
    carve-out for persisting data was given back.
    """

    def __init__(
        self, device: torch.device, cache_bytes: int, release_carve_out: Callable[[], None] | None = None
    ) -> None:
        self._device, self._cycles = device, _FIRST_WAIT
        flush = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)
        self._overwrite_cache: Callable[[], Any] = flush.zero_
        self._release_carve_out = release_carve_out or carve_out_release()

    def __call__(
        self, prepare: Callable[[], None], parts: Sequence[Callable[[], Any]], after: Callable[[], None]
    ) -> Sample:
        """A wait that was too short is doubled, and the sample taken again with other inputs."""
        while True:
            sample = self._once(prepare, parts, after)
            if not sample.gaps or self._cycles >= _LONGEST_WAIT:
                return sample
            self._cycles *= 2

    def _once(
        self, prepare: Callable[[], None], parts: Sequence[Callable[[], Any]], after: Callable[[], None]
    ) -> Sample:
        torch.cuda.synchronize(self._device)
        self._release_carve_out()
        torch.cuda._sleep(self._cycles)
        prepare()
        self._overwrite_cache()
        marks = [_event() for _ in range(len(parts) + 1)]
        marks[0].record()
        begin = _NOW()
        for part, mark in zip(parts, marks[1:], strict=True):
            part()
            mark.record()
        launch_ms = (_NOW() - begin) * 1e3
        gaps = bool(marks[0].query())  # the device had come to the call before it was launched as a whole
        after()
        done = _event()
        done.record()
        done.synchronize()
        since = _NOW()
        torch.cuda.synchronize(self._device)
        late_ms = (_NOW() - since) * 1e3
        times = tuple(float(start.elapsed_time(end)) for start, end in pairwise(marks))
        return Sample(times, None if gaps else launch_ms, late_ms, gaps=gaps)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def carve_out_release() -> Callable[[], None]:
    """A call that makes all of the L2 cache ordinary again. A kernel may have set some of it aside for data that
    persists, which an overwritten cache would keep. Does nothing where the driver has no such carve-out.
    """
    if torch.version.hip is not None:
        return lambda: None
    driver = ctypes.CDLL("libcuda.so.1")

    def release() -> None:
        driver.cuCtxSetLimit(_PERSISTING_L2_LIMIT, ctypes.c_size_t(0))
        driver.cuCtxResetPersistingL2Cache()

    return release


def times_ms(device: torch.device, work: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """ms of each of `repeats` calls that follow each other: elapsed on a CPU, between events on a CUDA device, where
    the host runs ahead so that no launch is in the time.
    """
    for _ in range(warm_up):
        work()
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            found.append((time.perf_counter() - start) * 1e3)
        return found
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_FIRST_WAIT * 10)
    marks = [_event() for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return [float(start.elapsed_time(end)) for start, end in pairwise(marks)]
