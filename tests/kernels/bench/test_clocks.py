"""The device clock counts the device's time: no launch gap, no other stream left out, no cache kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_cuda import SimulatedCuda

from weftrain.kernels.bench import clocks
from weftrain.kernels.bench.clocks import StreamClock, carve_out_release, wall_clock


class Flush:
    def __init__(self, device: SimulatedCuda) -> None:
        self.zero_: Callable[[], None] = lambda: device.launch(0.2, "flush")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedCuda:
    found = SimulatedCuda(launch_ms=0.02)
    found.install(monkeypatch)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Flush(found))
    return found


def clock_of(device: SimulatedCuda) -> StreamClock:
    return StreamClock(torch.device("cuda"), 4096, lambda: device.log.append("carve-out"))


def test_launch_gaps_are_not_counted_and_launching_is_known_apart(device: SimulatedCuda) -> None:
    """Ten kernels of 1 us, each of which the host needs 20 us to launch."""

    def forward() -> None:
        for _ in range(10):
            device.launch(0.001)

    sample = clock_of(device)(lambda: device.launch(0.1, "inputs"), [forward, forward], lambda: None)
    assert sample.parts_ms == pytest.approx((0.01, 0.01))
    assert sample.launch_ms == pytest.approx(20 * 0.02)
    assert (sample.gaps, sample.late_ms) == (False, 0.0)
    order = [name for name in device.log if name != "kernel"]
    assert order == ["carve-out", "wait", "inputs", "flush"], "new inputs, then the cache is overwritten"


def test_a_wait_that_was_too_short_is_doubled_with_other_inputs(device: SimulatedCuda) -> None:
    prepared = 0

    def prepare() -> None:
        nonlocal prepared
        prepared += 1

    def forward() -> None:
        for _ in range(100):
            device.launch(0.001)  # 2 ms of launching, and the first wait is of 1 ms

    sample = clock_of(device)(prepare, [forward], lambda: None)
    assert sample.parts_ms == pytest.approx((0.1,))
    assert not sample.gaps
    assert prepared == 2


def test_a_call_that_waits_for_the_device_says_that_gaps_count(
    device: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "_LONGEST_WAIT", 4 * clocks._FIRST_WAIT)

    def forward() -> None:
        device.launch(0.001)
        device.synchronize()
        device.launch(0.001)

    sample = clock_of(device)(lambda: None, [forward], lambda: None)
    assert sample.gaps
    assert sample.launch_ms is None
    assert sample.ms == pytest.approx(0.002 + 0.02)


def test_what_another_stream_goes_on_with_is_late(device: SimulatedCuda) -> None:
    def forward() -> None:
        with device.stream("side"):
            device.launch(7.0)

    sample = clock_of(device)(lambda: device.launch(0.1), [forward], lambda: None)
    assert sample.ms == pytest.approx(0.0)
    assert sample.late_ms > 1.0


def test_the_carve_out_is_released_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int]] = []

    class Driver:
        def __init__(self, name: str) -> None:
            called.append((name, 0))

        def cuCtxSetLimit(self, limit: int, value: Any) -> None:  # noqa: N802 (the driver's name)
            called.append(("limit", limit))

        def cuCtxResetPersistingL2Cache(self) -> None:  # noqa: N802
            called.append(("reset", 0))

    monkeypatch.setattr(clocks.ctypes, "CDLL", Driver)
    monkeypatch.setattr(torch.version, "hip", None)
    carve_out_release()()
    assert called == [("libcuda.so.1", 0), ("limit", 6), ("reset", 0)]
    monkeypatch.setattr(torch.version, "hip", "6.3")
    carve_out_release()()
    assert len(called) == 3


def test_the_wall_clock_times_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.25, 1.75])
    spent = iter([5.0, 6.0])
    order: list[str] = []
    monkeypatch.setattr(clocks, "_NOW", lambda: next(now))
    monkeypatch.setattr(clocks, "_PROCESSOR_TIME", lambda: next(spent))
    parts = [lambda: order.append("forward"), lambda: order.append("backward")]
    sample = wall_clock(lambda: order.append("inputs"), parts, lambda: order.append("look"))
    assert (sample.parts_ms, sample.ms, sample.processor_ms) == ((250.0, 500.0), 750.0, 1000.0)
    assert order == ["inputs", "forward", "backward", "look"]
