"""The peak that MFU is measured against: measured here, or from a table with sources, or unknown. Never guessed.

What a reader would get wrong: an unknown device has no default. A guessed peak makes utilisation a lie, so the caller
gets None.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from weftrain.core.backend import Fingerprint
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.run.speed import Peak

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


def measured_matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 20) -> Peak:
    """The best of `repeats` products of two [size, size] matrices after a warm-up: 2 size^3 FLOPs each. About a second
    on two cores.
    """
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(2):
        seconds()
    best = min(seconds() for _ in range(repeats))
    return Peak(
        2 * size**3 / best,
        f"measured: {size} x {size} matrix multiply, {str(dtype).removeprefix('torch.')}, best of {repeats}",
    )


def machine_name(fingerprint: Fingerprint, compute: str) -> str:
    """A name for what a measured peak depends on: host, device, threads, ranks and dtype. A hash, so that records name
    no host.
    """
    device = [fingerprint.device_type, fingerprint.device, fingerprint.threads, fingerprint.ranks]
    return sha256_json([platform.node(), platform.processor(), *device, compute])[:16]


def speed_probe(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> Callable[[], float]:
    """A yardstick for a machine whose speed drifts: called, it gives the ms of one fixed matrix product now, the median
    of `repeats`.
    """
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def ms() -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    ms()
    return ms


def table_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The data sheet's peak of a CUDA device in bf16; unknown for every other device and dtype."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if name in BF16_PEAK_FLOPS:
            flops, source = BF16_PEAK_FLOPS[name]
            return Peak(flops, f"{name}: {source}")
    return Peak(None, "no sourced peak for this device")


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


@dataclass(frozen=True)
class Bandwidth:
    """Bytes/s of main memory and where the figure comes from; None: unknown."""

    bytes_per_second: float | None
    origin: str

    def __str__(self) -> str:
        return (
            "unknown" if self.bytes_per_second is None else f"{self.bytes_per_second / 1e9:,.1f} GB/s ({self.origin})"
        )


def measured_bandwidth(device: torch.device, size_bytes: int = 2**28, repeats: int = 10) -> Bandwidth:
    """The best of a copy (2 x size bytes) and a triad a = b + 2 c (3 x size bytes) over fp32 arrays of `size_bytes`
    each.

    Bytes are those that the program names: the line that a CPU reads before it writes it is not counted, as it is not
    counted for a kernel. `size_bytes` must be far beyond the last cache.
    """
    a, b, c = (torch.full((size_bytes // 4,), value, device=device) for value in (0.0, 1.0, 2.0))
    best, name = 0.0, ""
    for pattern, moved in (("copy", 2 * size_bytes), ("triad", 3 * size_bytes)):
        for repeat in range(repeats + 2):
            start = time.perf_counter()
            if pattern == "copy":
                a.copy_(b)
            else:
                torch.add(b, c, alpha=2.0, out=a)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rate = moved / (time.perf_counter() - start)
            if repeat >= 2 and rate > best:
                best, name = rate, pattern
    return Bandwidth(best, f"measured: {name} of {size_bytes // 2**20} MiB arrays, best of {repeats}")


def table_bandwidth(device: torch.device) -> Bandwidth:
    """The data sheet's bandwidth of a GPU; unknown for every other device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if name in SOURCED_BANDWIDTH:
            rate, source = SOURCED_BANDWIDTH[name]
            return Bandwidth(rate, f"{name}: {source}")
    return Bandwidth(None, "no sourced bandwidth for this device")
