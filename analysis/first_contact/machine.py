"""What the machine is, and the ceilings that every other figure is judged by."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from weftrain.analysis.first_contact.conditions import Conditions
from weftrain.analysis.first_contact.findings import Answer, Findings
from weftrain.analysis.machine.environment import environment, identity
from weftrain.kernels import table
from weftrain.kernels.bench.roofline import measured_bandwidth, measured_matmul_peak, table_bandwidth, table_peak
from weftrain.kernels.cuda_devices import absence

ANSWERS = "the device answers"  # the first question: without it nothing else is asked
_QUEUE_CYCLES = 60_000_000  # about 30 ms: the host is ahead of the device when the first timed call begins


def machine(conditions: Conditions, findings: Findings) -> None:
    """Versions and conditions, then what the device reaches by events and by weftrain's own measure."""
    findings.ask(ANSWERS, lambda: _answers(conditions))
    findings.ask("versions and conditions", lambda: _versions(conditions))
    findings.ask("ceilings, timed by events", lambda: _ceilings(conditions))
    findings.ask("ceilings as `weftrain bench` measures them", lambda: _own_ceilings(conditions))


def _answers(conditions: Conditions) -> Answer:
    absent = None if conditions.dry else absence()
    return Answer(absent is None, details={} if absent is None else {"why": absent.reason})


def _versions(conditions: Conditions) -> Answer:
    device = torch.device(conditions.device)
    about: dict[str, Any] = {"weftrain": identity(), **environment(device)}
    if not conditions.dry:
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"sm_{properties.major}{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        }
    rows = table(conditions.device, torch.bfloat16)
    about["kernel_sources"] = sorted({row.source for row in rows if row.reason is None})
    about["kernels_not_available"] = {f"{row.op} {row.source}": row.reason for row in rows if row.reason is not None}
    return Answer(details=about)


def _ceilings(conditions: Conditions) -> Answer:
    size, count, block = (256, 1 << 20, 1 << 20) if conditions.dry else (8192, 1 << 30, 1 << 30)
    there = conditions.device
    a, b = (torch.randn(size, size, device=there, dtype=torch.bfloat16) for _ in range(2))
    product_ms = queued_ms(lambda: torch.mm(a, b), 12, there)
    x, y = torch.randn(count, device=there), torch.empty(count, device=there)
    figures = {
        "bf16 product, TFLOP/s": 2 * size**3 / product_ms / 1e9,
        "copy in device memory, GB/s": 8 * count / queued_ms(lambda: y.copy_(x), 8, there) / 1e6,
    }
    if not conditions.dry:
        pinned, pageable = torch.empty(block, dtype=torch.uint8, pin_memory=True), torch.empty(block, dtype=torch.uint8)
        on_device = torch.empty(block, dtype=torch.uint8, device=there)
        copies: dict[str, Callable[[], Any]] = {
            "pinned host to device, GB/s": lambda: on_device.copy_(pinned, non_blocking=True),
            "device to pinned host, GB/s": lambda: pinned.copy_(on_device, non_blocking=True),
            "device to pageable host, GB/s": lambda: pageable.copy_(on_device),
        }
        figures |= {name: block / queued_ms(copy, 3, there) / 1e6 for name, copy in copies.items()}
    return Answer(figures=figures)


def _own_ceilings(conditions: Conditions) -> Answer:
    there = torch.device(conditions.device)
    peak = measured_matmul_peak(there, torch.bfloat16, *([256] if conditions.dry else []))
    bandwidth = measured_bandwidth(there, *([1 << 22] if conditions.dry else []))
    sheet = {
        "data sheet, bf16 TFLOP/s": (table_peak(there, torch.bfloat16).per_second or 0) / 1e12,
        "data sheet, GB/s": (table_bandwidth(there).per_second or 0) / 1e9,
    }
    return Answer(
        figures={
            "bf16 product, TFLOP/s": (peak.per_second or 0) / 1e12,
            "copy or triad in device memory, GB/s": (bandwidth.per_second or 0) / 1e9,
            **{name: value for name, value in sheet.items() if value},
        },
        details={"product": peak.origin, "memory": bandwidth.origin},
    )


def queued_ms(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Median time of a call on the device. On CUDA a wait is queued first, so that no gap between launches counts."""
    call()
    if device == "cpu":
        times = []
        for _ in range(min(repeats, 3)):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(_QUEUE_CYCLES)  # type: ignore[no-untyped-call]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
