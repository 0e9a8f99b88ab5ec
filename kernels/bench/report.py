"""What a benchmark of kernels found: measurements, and what was not measured or refused, with the reasons."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 2  # 1 had no direction "backward", and no launch_ms, peak_bytes, checked, error and refused


@dataclass(frozen=True)
class Measurement:
    """One source on one example, in one direction. Costs are the op's own; None: unknown."""

    op: str
    example: str
    source: str
    version: str
    dtype: str
    direction: str  # "forward" (no gradients wanted), "forward+backward", or "backward": the second part of those
    median_ms: float  # on a CUDA device: of the device
    low_ms: float  # the interval that holds the median with `confidence`
    high_ms: float
    confidence: float
    samples: int
    bytes: int
    flops: int
    gb_per_second: float
    gflop_per_second: float
    ideal_ms: float | None  # max(flops / peak, bytes / bandwidth)
    bound: str | None  # "compute" or "memory": which of the two
    roofline_share: float | None  # ideal_ms / median_ms
    sourced_roofline_share: float | None  # against the data sheet instead of what was measured here
    copies: int  # of the inputs, used in turn
    working_set_bytes: int
    beyond_cache: bool
    # "plumbing only": the time of an interpreted kernel says nothing about a GPU; "comparison only": cannot be chosen
    note: str = ""
    error: str = ""  # why the figures are not to be believed
    launch_ms: float | None = None  # of the host, on a CUDA device; not in median_ms
    peak_bytes: int | None = None  # allocated at once during a call, beyond its inputs
    checked: int = 0  # samples whose results were compared with the truth


@dataclass(frozen=True)
class SkippedExample:
    """What was not measured, and why."""

    op: str
    example: str
    source: str
    reason: str


@dataclass(frozen=True)
class RefusedExample:
    """An implementation that looked fast without doing its work. trick: one of honesty.py."""

    op: str
    example: str
    source: str
    direction: str
    trick: str
    detail: str


@dataclass(frozen=True)
class KernelBenchReport:
    environment: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[SkippedExample] = field(default_factory=list)
    refused: list[RefusedExample] = field(default_factory=list)

    def to_json(self) -> str:
        document = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(document, indent=1) + "\n"

    @property
    def honest(self) -> bool:
        """Whether nothing was refused and no row has an error."""
        return not self.refused and not any(one.error for one in self.measurements)
