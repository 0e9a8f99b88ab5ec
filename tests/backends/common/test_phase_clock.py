"""The parts of a step add up to the time between the first mark and the stop; a step's time covers its update."""

from __future__ import annotations

import pytest
import torch
from simulated_cuda import SimulatedCuda

from weftrain.backends.common import phase_clock
from weftrain.backends.common.phase_clock import PhaseClock, StepClock


def test_a_part_that_comes_twice_has_the_sum_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: next(moments))
    clock = PhaseClock(torch.device("cpu"), on=True)
    for part in ("forward", "backward", "forward"):
        clock.to(part)
    assert clock.stop() == {"forward": 5000.0, "backward": 2000.0}


def test_off_it_measures_nothing() -> None:
    clock = PhaseClock(torch.device("cpu"), on=False)
    clock.to("forward")
    assert clock.stop() is None


@pytest.mark.parametrize("between_ms", [0.0, 1000.0])
def test_on_a_stream_a_step_is_timed_from_result_to_result(monkeypatch: pytest.MonkeyPatch, between_ms: float) -> None:
    """Rows 5 ms, forward and backward 100 ms, update 40 ms, which the host does not wait for."""
    device = SimulatedCuda(launch_ms=0.0)
    device.install(monkeypatch)
    clock, found, started = StepClock(torch.device("cuda")), [], []
    for _ in range(4):
        started.append(device.now)
        clock.begin()
        device.host(5.0)
        device.launch(100.0)
        clock.result()
        device.synchronize()
        device.launch(40.0)
        found.append(clock.end())
        device.host(between_ms)
    rows_ms = 5.0 if between_ms else 0.0  # read while the update runs, unless the device is idle by then
    assert found == pytest.approx([105.0, *[140.0 + rows_ms] * 3])
    assert device.waits == 4, "one wait of the host a step, that for the result"
    if not between_ms:
        assert started[3] - started[1] == pytest.approx(found[2] + found[3]), "nothing lies between two steps"


def test_on_a_cpu_a_step_lasts_from_begin_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 3.5])
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: next(moments))
    clock = StepClock(torch.device("cpu"))
    clock.begin()
    clock.result()
    assert clock.end() == 2500.0
