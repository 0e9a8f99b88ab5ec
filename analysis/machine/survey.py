"""What every rank of a machine can do: matrix multiplies by dtype, memory, disk, and collectives by size.

A mean would hide the one slow device that a whole cluster waits for, so each rank is measured by itself, all at the
same time, and every rank more than a tenth below the median is named.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from weftrain.analysis.machine.disk import measured_disk
from weftrain.analysis.machine.environment import environment
from weftrain.core.formats.units import gb, gib
from weftrain.kernels.bench.roofline import measured_bandwidth, measured_matmul_peak, table_peak

OUTLIER = 0.9  # of the median
_REPEATS = 5


def measure_ranks(ranks: int, largest_mib: int, disk: Path | None) -> dict[str, Any] | None:
    """All figures on rank 0, None on the others; run under torchrun for several ranks."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if ranks == 1:
        own = _own_figures(device)
        found: dict[str, Any] = {"environment": environment(device), "ranks": [own], "collectives": []}
    else:
        dist.init_process_group("nccl" if cuda else "gloo")
        try:
            dist.barrier()
            own = _own_figures(device)
            figures = torch.tensor(
                [own["matmul_flops"][name] for name in sorted(own["matmul_flops"])] + [own["memory_bytes_per_s"]],
                device=device,
            )
            gathered = [torch.empty_like(figures) for _ in range(ranks)]
            dist.all_gather(gathered, figures)
            collectives = _collectives(device, largest_mib)
            names = sorted(own["matmul_flops"])
            rows = [row.tolist() for row in gathered]
            each = [
                {"rank": rank, "matmul_flops": dict(zip(names, row[:-1], strict=True)), "memory_bytes_per_s": row[-1]}
                for rank, row in enumerate(rows)
            ]
            found = {"environment": environment(device), "ranks": each, "collectives": collectives}
            if dist.get_rank() != 0:
                return None
        finally:
            dist.destroy_process_group()
    if disk is not None:
        speed = measured_disk(disk)
        found["disk_bytes_per_s"] = {"folder": str(disk), "read": speed.read, "write": speed.write, "both": speed.mixed}
    sourced = table_peak(device, torch.bfloat16)
    found["sourced_peak"] = {"bf16_flops": sourced.per_second, "origin": sourced.origin}
    return found


def _own_figures(device: torch.device) -> dict[str, Any]:
    flops = {}
    for name in ("float32", "bfloat16", *(("float16",) if device.type == "cuda" else ())):
        flops[name] = measured_matmul_peak(device, getattr(torch, name)).per_second or 0.0
    return {
        "rank": int(os.environ.get("RANK", "0")),
        "host": socket.gethostname(),
        "matmul_flops": flops,
        "memory_bytes_per_s": measured_bandwidth(device).per_second or 0.0,
    }


def _collectives(device: torch.device, largest_mib: int) -> list[dict[str, Any]]:
    """For each operation and size: every rank's median time, and the bus bandwidth as defined by NCCL's tests."""
    size, ranks = 64 << 10, dist.get_world_size()
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    found = []
    while size <= largest_mib << 20:
        count = size // 4 // ranks * ranks
        whole, part = torch.ones(count, device=device), torch.ones(count // ranks, device=device)
        into = torch.empty_like(whole)
        operations: dict[str, tuple[Callable[[], Any], float]] = {
            "all_reduce": (partial(dist.all_reduce, whole), 2 * (ranks - 1) / ranks),
            "all_gather": (partial(gather, into, part), (ranks - 1) / ranks),
            "reduce_scatter": (partial(scatter, part, whole), (ranks - 1) / ranks),
            "all_to_all": (partial(dist.all_to_all_single, into, whole), (ranks - 1) / ranks),
        }
        for name, (operation, factor) in operations.items():
            own = torch.tensor([_seconds(operation, device)], device=device)
            every = [torch.empty_like(own) for _ in range(ranks)]
            dist.all_gather(every, own)
            seconds = [float(value) for value in every]
            slowest = max(seconds)
            sent = count * 4
            found.append(
                {"operation": name, "bytes": sent, "seconds": seconds, "bus_bytes_per_s": sent * factor / slowest}
            )
        size *= 4
    return found


def _seconds(operation: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        start = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def outliers(values: dict[int, float]) -> list[int]:
    """Ranks whose rate is more than a tenth below the median of all."""
    middle = statistics.median(values.values())
    return [rank for rank, value in values.items() if value < OUTLIER * middle]


def machine_lines(found: dict[str, Any]) -> Iterator[str]:
    """The figures as lines of text."""
    about, ranks = found["environment"], found["ranks"]
    torch_version = about["libraries"]["torch"]
    memory = gib(about["memory_bytes"])
    yield f"{about['device']}; {about['cpu_count']} CPU cores, {memory}; torch {torch_version}"
    for name in ranks[0]["matmul_flops"]:
        yield from _rate_lines(
            f"matrix multiply {name}", {one["rank"]: one["matmul_flops"][name] for one in ranks}, "GFLOP/s"
        )
    yield from _rate_lines("memory", {one["rank"]: one["memory_bytes_per_s"] for one in ranks}, "GB/s")
    sourced = found["sourced_peak"]["bf16_flops"]
    yield f"{'bf16 peak, data sheet':<26} {'unknown' if sourced is None else f'{sourced / 1e12:,.1f} TFLOP/s'}"
    if "disk_bytes_per_s" in found:
        disk = found["disk_bytes_per_s"]
        read, write, both = (gb(disk[key]) for key in ("read", "write", "both"))
        yield f"{'disk':<26} read {read}/s, write {write}/s, both at once {both}/s ({disk['folder']})"
    for one in found["collectives"]:
        slow = outliers({rank: 1 / seconds for rank, seconds in enumerate(one["seconds"])})
        told = f"; outliers: {', '.join(f'rank {rank}' for rank in slow)}" if slow else ""
        size, middle_ms, bus = gb(one["bytes"]), statistics.median(one["seconds"]) * 1e3, gb(one["bus_bytes_per_s"])
        yield f"{one['operation']:<16} {size:>12}  {middle_ms:>9,.3f} ms  bus {bus}/s{told}"


def _rate_lines(name: str, values: dict[int, float], unit: str) -> Iterator[str]:
    scaled = {rank: value / 1e9 for rank, value in values.items()}
    told = (
        ""
        if len(scaled) == 1
        else f" (min {min(scaled.values()):,.1f}, max {max(scaled.values()):,.1f} of {len(scaled)} ranks)"
    )
    yield f"{name:<26} {statistics.median(scaled.values()):,.1f} {unit}{told}"
    for rank in outliers(scaled):
        yield f"  outlier: rank {rank} has {scaled[rank]:,.1f} {unit}"
