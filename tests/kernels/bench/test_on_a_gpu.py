"""What only a device can show of the benchmark: `make test-gpu`. Elsewhere these are skipped."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from weftrain.backends.common.phase_clock import StepClock
from weftrain.kernels import OPS, Implementation
from weftrain.kernels.bench import honesty, measure
from weftrain.kernels.bench.clocks import StreamClock, times_ms
from weftrain.kernels.bench.measure import bench
from weftrain.kernels.bench.report import KernelBenchReport
from weftrain.kernels.bench.roofline import Machine, Rate, last_level_cache, measured_bandwidth, measured_matmul_peak

NORM = OPS["rms_norm"].function


@pytest.fixture(autouse=True)
def device(kernel_device: str) -> torch.device:
    if kernel_device != "cuda":
        pytest.skip("asked of a CUDA device alone (--kernel-device cuda)")
    return torch.device(kernel_device)


def measured(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, suite: str = "small") -> KernelBenchReport:
    rate = Rate(1e18, "by hand", "")
    known = Machine(rate, rate, rate, rate, last_level_cache(torch.device("cuda"))[0], "", "cuda")
    catalog = {"rms_norm": {"planted": [Implementation("rms_norm", "planted", function)]}}
    monkeypatch.setattr(measure, "load_catalog", lambda: catalog)
    return bench(["rms_norm"], ["planted"], suite, torch.float32, "cuda", 5, known)


def test_an_honest_implementation_is_measured_without_launch_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(NORM, monkeypatch, "7b")
    assert report.honest, report
    forward = report.measurements[0]
    assert "launch gaps" not in forward.note
    assert forward.launch_ms is not None
    assert forward.peak_bytes is not None
    assert forward.peak_bytes >= 4 * 2048 * 4096


def beside() -> Callable[..., Any]:
    """The work on a stream that the caller's does not wait for."""
    side = torch.cuda.Stream()

    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        out = torch.zeros_like(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            torch.cuda._sleep(20_000_000)
            out.copy_(NORM(x, weight, eps=eps))
        return out

    return function


def before_its_inputs() -> Callable[..., Any]:
    """The work on a stream that waits for nobody: during the wait before the call."""
    side = torch.cuda.Stream()

    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        with torch.cuda.stream(side):
            found = NORM(x, weight, eps=eps)
        torch.cuda.current_stream().wait_stream(side)
        return found

    return function


def kept() -> Callable[..., Any]:
    answers: list[Tensor] = []

    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        answers[:] = answers or [NORM(x, weight, eps=eps).detach()]
        return answers[0].clone() + 0 * x

    return function


@pytest.mark.parametrize(
    ("plant", "tricks"),
    [
        (beside, {honesty.LATE, honesty.WRONG}),
        (before_its_inputs, {honesty.WRONG, honesty.CACHED}),
        (kept, {honesty.CACHED}),
    ],
)
def test_a_trick_is_refused(
    plant: Callable[[], Callable[..., Any]], tricks: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = measured(plant(), monkeypatch)
    assert [one for one in report.refused if one.direction == "forward"], report
    assert {one.trick for one in report.refused if one.direction == "forward"} <= tricks


def test_what_the_clock_counts_is_what_a_long_wait_lasts(device: torch.device) -> None:
    clock = StreamClock(device, last_level_cache(device)[0])
    one = clock(lambda: None, [lambda: torch.cuda._sleep(10_000_000)], lambda: None)
    ten = clock(lambda: None, [lambda: torch.cuda._sleep(100_000_000)], lambda: None)
    assert ten.ms / one.ms == pytest.approx(10, rel=0.1)
    assert one.late_ms < 0.1
    again = times_ms(device, lambda: torch.cuda._sleep(10_000_000), 3)
    assert min(again) == pytest.approx(one.ms, rel=0.1)


def test_the_peaks_are_those_of_a_gpu(device: torch.device) -> None:
    peak, bandwidth = measured_matmul_peak(device, torch.bfloat16), measured_bandwidth(device)
    assert peak.per_second is not None
    assert bandwidth.per_second is not None
    assert peak.per_second > 2e13
    assert bandwidth.per_second > 2e11


def test_a_step_is_timed_with_its_update(device: torch.device) -> None:
    """Forward and update are waits of one length each, and the host does not wait for the second."""
    clock, found = StepClock(device), []
    start = time.perf_counter()
    for _ in range(6):
        clock.begin()
        torch.cuda._sleep(20_000_000)
        clock.result()
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        found.append(clock.end())
    torch.cuda.synchronize()
    wall_ms = (time.perf_counter() - start) * 1e3
    assert found[1] == pytest.approx(2 * found[0], rel=0.2)
    assert sum(found) + found[0] == pytest.approx(wall_ms, rel=0.1)
