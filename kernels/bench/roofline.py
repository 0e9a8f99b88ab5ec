"""What a machine could do at best: peaks of matrix multiply and memory, measured here or from data sheets, or unknown.

An unknown device has no default: a guessed peak would make every share of it wrong, so its `Rate` has no figure. A
measured peak is a lower bound, since a busy moment can only lower it: measure at both ends of a run and take the larger
(`larger`).
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weftrain.kernels.bench.clocks import times_ms

# assumed where the operating system does not say: larger than any last-level cache in use
_UNKNOWN_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Rate:
    """FLOP/s or bytes/s, as `unit` says ("FLOP" or "B"), and where the figure comes from; None: unknown."""

    per_second: float | None
    origin: str
    unit: str

    def __str__(self) -> str:
        return "unknown" if self.per_second is None else f"{self.per_second / 1e9:,.1f} G{self.unit}/s ({self.origin})"


# Dense bf16 FLOP/s with fp32 accumulation, without sparsity, by torch.cuda.get_device_name().
BF16_PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": (312e12, "NVIDIA A100 data sheet"),
    "NVIDIA A100-SXM4-80GB": (312e12, "NVIDIA A100 data sheet"),
    "NVIDIA A100-PCIE-40GB": (312e12, "NVIDIA A100 data sheet"),
    "NVIDIA A100 80GB PCIe": (312e12, "NVIDIA A100 data sheet"),
    "NVIDIA H100 80GB HBM3": (989.4e12, "NVIDIA H100 data sheet, SXM, half of the figure with sparsity"),
    "NVIDIA H100 PCIe": (756e12, "NVIDIA H100 data sheet, PCIe, half of the figure with sparsity"),
    "NVIDIA H200": (989.4e12, "NVIDIA H200 data sheet, SXM, half of the figure with sparsity"),
    "AMD Instinct MI300X": (1307.4e12, "AMD Instinct MI300X data sheet"),
}


def measured_matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 20) -> Rate:
    """The best of `repeats` products of two [size, size] matrices after two warm-ups, 2 size^3 FLOPs each.

    size: 2048 on a CPU. A GPU is at its peak for far larger ones alone, so there it is 8192, timed on the device.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best_ms = min(times_ms(device, lambda: torch.mm(a, b, out=out), repeats))
    name = str(dtype).removeprefix("torch.")
    origin = f"measured: {size} x {size} matrix multiply, {name}, best of {repeats}"
    return Rate(2 * size**3 / best_ms * 1e3, origin, "FLOP")


def speed_probe(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> Callable[[], float]:
    """A yardstick for a machine whose speed drifts: a call gives the time in ms of one fixed matrix product now, the
    median of `repeats`.
    """
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def ms() -> float:
        return statistics.median(times_ms(device, lambda: torch.mm(a, b, out=out), repeats, warm_up=0))

    ms()
    return ms


def table_peak(device: torch.device, dtype: torch.dtype) -> Rate:
    """The data sheet's peak of a CUDA device in bf16; unknown for every other device and dtype."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if name in BF16_PEAK_FLOPS:
            flops, source = BF16_PEAK_FLOPS[name]
            return Rate(flops, f"{name}: {source}", "FLOP")
    return Rate(None, "no sourced peak for this device", "FLOP")


# Memory bandwidth in bytes/s by torch.cuda.get_device_name(), from the makers' data sheets.
SOURCED_BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": (1555e9, "NVIDIA A100 data sheet"),
    "NVIDIA A100-SXM4-80GB": (2039e9, "NVIDIA A100 data sheet"),
    "NVIDIA A100-PCIE-40GB": (1555e9, "NVIDIA A100 data sheet"),
    "NVIDIA A100 80GB PCIe": (1935e9, "NVIDIA A100 data sheet"),
    "NVIDIA H100 80GB HBM3": (3.35e12, "NVIDIA H100 data sheet, SXM"),
    "NVIDIA H100 PCIe": (2.0e12, "NVIDIA H100 data sheet, PCIe"),
    "NVIDIA H200": (4.8e12, "NVIDIA H200 data sheet, SXM"),
    "AMD Instinct MI300X": (5.3e12, "AMD Instinct MI300X data sheet"),
}


def measured_bandwidth(device: torch.device, size_bytes: int | None = None, repeats: int = 10) -> Rate:
    """The best of a copy (2 x size bytes) and a triad a = b + 2 c (3 x size bytes) over fp32 arrays of `size_bytes`
    each: 256 MiB, and 1 GiB on a GPU.

    Bytes are those that the program names: the cache line that a CPU reads before it writes it is not counted, as it is
    not for a kernel. `size_bytes` must be far larger than the last cache.
    """
    size_bytes = size_bytes or 2 ** (30 if device.type == "cuda" else 28)
    a, b, c = (torch.full((size_bytes // 4,), value, device=device) for value in (0.0, 1.0, 2.0))
    patterns: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: a.copy_(b), 2 * size_bytes),
        "triad": (lambda: torch.add(b, c, alpha=2.0, out=a), 3 * size_bytes),
    }
    rates = {name: moved / min(times_ms(device, work, repeats)) * 1e3 for name, (work, moved) in patterns.items()}
    name = max(rates, key=lambda pattern: rates[pattern])
    return Rate(rates[name], f"measured: {name} of {size_bytes / 2**30:.3g} GiB arrays, best of {repeats}", "B")


def table_bandwidth(device: torch.device) -> Rate:
    """The data sheet's bandwidth of a GPU; unknown for every other device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if name in SOURCED_BANDWIDTH:
            rate, source = SOURCED_BANDWIDTH[name]
            return Rate(rate, f"{name}: {source}", "B")
    return Rate(None, "no sourced bandwidth for this device", "B")


@dataclass(frozen=True)
class Machine:
    """The peaks of one device in one dtype."""

    measured_peak: Rate
    measured_bandwidth: Rate
    sourced_peak: Rate
    sourced_bandwidth: Rate
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
    """The larger of two measurements of each peak."""
    both = {
        name: max(getattr(first, name), getattr(second, name), key=lambda rate: rate.per_second or 0.0)
        for name in ("measured_peak", "measured_bandwidth")
    }
    return replace(first, **both)


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
    """What the figures depend on, for JSON; an unknown peak is null."""
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
        "measured_peak_gflop_per_second": _giga(machine.measured_peak.per_second),
        "measured_peak_origin": machine.measured_peak.origin,
        "measured_bandwidth_gb_per_second": _giga(machine.measured_bandwidth.per_second),
        "measured_bandwidth_origin": machine.measured_bandwidth.origin,
        "sourced_peak_gflop_per_second": _giga(machine.sourced_peak.per_second),
        "sourced_peak_origin": machine.sourced_peak.origin,
        "sourced_bandwidth_gb_per_second": _giga(machine.sourced_bandwidth.per_second),
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
