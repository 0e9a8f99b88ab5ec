"""Peaks of the machine: counted as stated, from an invented clock; unknown where no source says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from simulated_cuda import SimulatedCuda

from weftrain.kernels.bench import clocks, roofline
from weftrain.kernels.bench.roofline import (
    Machine,
    Rate,
    larger,
    last_level_cache,
    measured_bandwidth,
    measured_matmul_peak,
    table_bandwidth,
    table_peak,
)

KNOWN = Machine(
    Rate(1e12, "by hand", "FLOP"),
    Rate(1e10, "by hand", "B"),
    Rate(4e12, "sheet", "FLOP"),
    Rate(2e10, "sheet", "B"),
    4096,
    "by hand",
    "cpu",
)


def test_measured_peak_counts_2n3(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # each reading a second later: each product takes one second
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: float(next(clock)))
    found = measured_matmul_peak(torch.device("cpu"), torch.float32, size=64, repeats=3)
    assert found.per_second == 2 * 64**3
    assert "measured: 64 x 64" in str(found)


def test_a_device_without_a_source_is_unknown() -> None:
    found = table_peak(torch.device("cpu"), torch.bfloat16)
    assert found.per_second is None
    assert str(found) == "unknown"
    assert all(flops > 1e13 and source for flops, source in roofline.BF16_PEAK_FLOPS.values())


def test_the_larger_of_two_measurements_counts() -> None:
    busy = replace(KNOWN, measured_peak=Rate(5e11, "busy", "FLOP"), measured_bandwidth=Rate(3e10, "idle", "B"))
    found = larger(busy, KNOWN)
    assert (found.measured_peak, found.measured_bandwidth) == (KNOWN.measured_peak, busy.measured_bandwidth)


def test_the_cache_is_read_from_the_system(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "33M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache(torch.device("cpu"), tmp_path) == (33 * 2**20, "largest cache of cpu0")
    size, origin = last_level_cache(torch.device("cpu"), tmp_path / "none")
    assert (size, origin) == (256 * 2**20, "unknown; assumed to be at most this")


def test_bandwidth_counts_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pattern takes 1 ms of an invented clock: a triad moves three arrays, a copy two."""
    now = iter(i * 1e-3 for i in range(1000))
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(now))
    found = measured_bandwidth(torch.device("cpu"), size_bytes=2**20, repeats=2)
    assert found.per_second == pytest.approx(3 * 2**20 / 1e-3)
    assert found.origin == "measured: triad of 0.000977 GiB arrays, best of 2"
    assert str(found) == "3.1 GB/s (measured: triad of 0.000977 GiB arrays, best of 2)"
    assert str(table_bandwidth(torch.device("cpu"))) == "unknown"


def test_the_real_machine_has_figures() -> None:
    found = measured_matmul_peak(torch.device("cpu"), torch.float32, size=256, repeats=3)
    assert found.per_second is not None
    assert found.per_second > 1e8
    bandwidth = measured_bandwidth(torch.device("cpu"), size_bytes=2**24, repeats=2)
    assert bandwidth.per_second is not None
    assert 1e7 < bandwidth.per_second < 1e13


def test_a_gpu_is_measured_on_the_device_at_its_full_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """8192^3 in 0.8 ms, and 1 GiB arrays, though the host needs longer to launch each."""
    device = SimulatedCuda(launch_ms=1.0)
    device.install(monkeypatch)
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.empty(*shape, device="meta"))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: device.launch(0.8))
    found = measured_matmul_peak(torch.device("cuda"), torch.bfloat16)
    assert found.per_second == pytest.approx(2 * 8192**3 / 0.8e-3)
    assert found.origin == "measured: 8192 x 8192 matrix multiply, bfloat16, best of 20"
    assert roofline.speed_probe(torch.device("cuda"), torch.bfloat16)() == pytest.approx(0.8)

    class Array:
        def copy_(self, other: object) -> None:
            device.launch(0.6)

    monkeypatch.setattr(torch, "full", lambda *_, **__: Array())
    monkeypatch.setattr(torch, "add", lambda *_, **__: device.launch(0.95))
    bandwidth = measured_bandwidth(torch.device("cuda"))
    assert bandwidth.per_second == pytest.approx(2 * 2**30 / 0.6e-3)
    assert bandwidth.origin == "measured: copy of 1 GiB arrays, best of 10"
