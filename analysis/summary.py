"""A finished run in a few lines, computed from its metrics.jsonl alone.

What a reader would get wrong: tokens per second is the median over the logged steps after the first tenth, so a slow start (compilation,
cold caches) does not stand in it, and nothing is averaged over wall time that includes evaluation and checkpoints.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.metrics import read_metrics
from weftrain.core.speed import run_utilization


@dataclass(frozen=True)
class RunSummary:
    """What a run came to. Losses are means over a step's tokens; heldout maps a set to its (first, last) held-out loss."""

    steps: int
    tokens: int
    loss_first: float
    loss_last: float
    heldout: dict[str, tuple[float, float]]
    tokens_per_second: float
    model_flops_utilization: float | None  # None: unknown
    peak_flops: float | None  # that it was measured against


def summarize(folder: Path) -> RunSummary | None:
    """The summary of the run in `folder`, or None if it logged no step."""
    records = read_metrics(folder)
    steps: list[dict[str, Any]] = [record for record in records if record["kind"] == "step"]
    if not steps:
        return None
    warm = steps[len(steps) // 10 :]
    heldout: dict[str, tuple[float, float]] = {}
    for record in records:
        if record["kind"] == "evaluation":
            name, loss = record["set"], float(record["loss"])
            heldout[name] = (heldout[name][0] if name in heldout else loss, loss)
    rates = [rate for record in warm if math.isfinite(rate := float(record["tokens_per_second"]))]
    tokens_per_second = statistics.median(rates) if rates else math.nan
    used = run_utilization(records)
    return RunSummary(
        steps=steps[-1]["step"],
        tokens=steps[-1]["tokens"],
        loss_first=float(steps[0]["loss"]),
        loss_last=float(steps[-1]["loss"]),
        heldout=heldout,
        tokens_per_second=tokens_per_second,
        model_flops_utilization=used[0] if used else None,
        peak_flops=used[1].flops if used else None,
    )
