"""The machine that a benchmark runs on: its peaks, measured and from data sheets, its last cache, and its description.

What a reader would get wrong: a measured peak is a lower bound, since a busy moment can only lower it. So it is
measured at both ends of a run, and the larger counts.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weftrain.analysis.peak import Bandwidth, measured_bandwidth, measured_matmul_peak, table_bandwidth, table_peak
from weftrain.core.run.speed import Peak

# assumed where the operating system does not say: larger than any last-level cache in use
_UNKNOWN_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Machine:
    """The peaks of one device in one dtype."""

    measured_peak: Peak
    measured_bandwidth: Bandwidth
    sourced_peak: Peak
    sourced_bandwidth: Bandwidth
    cache_bytes: int
    cache_origin: str
    device_type: str


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Peaks measured here and from data sheets, and the size of the last cache. About 3 s on two cores."""
    cache, origin = last_level_cache(device)
    return Machine(
        measured_matmul_peak(device, dtype),
        measured_bandwidth(device),
        table_peak(device, dtype),
        table_bandwidth(device),
        cache,
        origin,
        device.type,
    )


def larger(first: Machine, second: Machine) -> Machine:
    """The larger of two measurements of each peak: a busy moment makes a peak too low, and never too high."""
    return Machine(
        max(first.measured_peak, second.measured_peak, key=lambda peak: peak.flops or 0.0),
        max(
            first.measured_bandwidth, second.measured_bandwidth, key=lambda bandwidth: bandwidth.bytes_per_second or 0.0
        ),
        first.sourced_peak,
        first.sourced_bandwidth,
        first.cache_bytes,
        first.cache_origin,
        first.device_type,
    )


def last_level_cache(device: torch.device, sysfs: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> tuple[int, str]:
    """(bytes, where it comes from) of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size), "L2 of the device"
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for path in sorted(sysfs.glob("index*/size")):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    if not sizes:
        return _UNKNOWN_CACHE_BYTES, "unknown; assumed to be at most this"
    return max(sizes), "largest cache of cpu0"


def environment(device: torch.device, dtype: torch.dtype, suite: str, repeats: int, machine: Machine) -> dict[str, Any]:
    """What the figures depend on, JSON-able; a peak that nobody knows is null."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "dtype": str(dtype).removeprefix("torch."),
        "suite": suite,
        "repeats": repeats,
        "measured_peak_gflop_per_second": _giga(machine.measured_peak.flops),
        "measured_peak_origin": machine.measured_peak.origin,
        "measured_bandwidth_gb_per_second": _giga(machine.measured_bandwidth.bytes_per_second),
        "measured_bandwidth_origin": machine.measured_bandwidth.origin,
        "sourced_peak_gflop_per_second": _giga(machine.sourced_peak.flops),
        "sourced_peak_origin": machine.sourced_peak.origin,
        "sourced_bandwidth_gb_per_second": _giga(machine.sourced_bandwidth.bytes_per_second),
        "sourced_bandwidth_origin": machine.sourced_bandwidth.origin,
        "cache_bytes": machine.cache_bytes,
        "cache_origin": machine.cache_origin,
    }


def _giga(value: float | None) -> float | None:
    return None if value is None else round(value / 1e9, 3)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
