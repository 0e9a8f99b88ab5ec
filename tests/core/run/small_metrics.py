"""Small metrics files as a run leaves them."""

from __future__ import annotations

import math
from typing import Any

from weftrain.core.run.metrics import MetricsWriter


def step_record(step: int, run: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 10 / step + run,
        "grad_norm": 1.5,
        "learning_rate": {"matrices": 0.001 * step, "others": 0.016 * step},
        "tokens": step * 640,
        "model_flops_utilization": "unknown",
        "skipped": False,
    }


def train(writer: MetricsWriter, first: int, last: int, run: int = 0) -> None:
    for step in range(first, last + 1):
        writer.step(step_record(step, run))
        if step % 4 == 0:
            writer.evaluation({"step": step, "set": "held", "loss": 3.0 + run, "perplexity": math.inf, "tokens": 100})
