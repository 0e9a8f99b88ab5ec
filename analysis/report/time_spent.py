"""What became of a run's time, from its record: steps that count, steps made again, evaluations, and the rest.

The time is that from the first start to the newest line of metrics, hours in which nothing ran among them. Where not
every step is logged, a logged one stands for those since the one before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from weftrain.analysis.report.curves import Curves, Points


@dataclass(frozen=True)
class TimeSpent:
    """All in seconds. again_s: steps that do not count, since the run went back behind them. evaluations_s: what lay
    between steps for evaluations of the line that counts and of others.
    """

    whole_s: float
    steps_s: float
    again_s: float
    evaluations_s: float

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps that count."""
        return self.steps_s / self.whole_s

    @property
    def rest_s(self) -> float:
        """Starts, saves, logging, and while nothing ran; not below 0, whatever a clock did that was set."""
        return max(0.0, self.whole_s - self.steps_s - self.again_s - self.evaluations_s)

    def words(self) -> tuple[tuple[str, str], ...]:
        """(name, value) for the page."""
        parts = {
            "goodput, in steps that count": self.steps_s,
            "in steps made again or abandoned": self.again_s,
            "in evaluations": self.evaluations_s,
            "in starts, saves, and while nothing ran": self.rest_s,
        }
        shares = tuple((name, f"{share / self.whole_s:.1%}, {share:,.4g} s") for name, share in parts.items())
        return (("from the first start to the newest line", f"{self.whole_s:,.5g} s"), *shares)


def time_spent(curves: Curves, begin_s: float | None) -> TimeSpent | None:
    """begin_s: the first start, seconds since 1970. None where the record does not tell its times."""
    parts = [curves.own, *(part for _, part in curves.abandoned)]
    whole_s = max(part.last_time for part in parts) - (math.nan if begin_s is None else begin_s)
    if not whole_s > 0 or not math.isfinite(whole_s) or not len(curves.own.training["step_ms"]):
        return None
    own, *abandoned = (_seconds(part.training["step_ms"], first=number == 0) for number, part in enumerate(parts))
    return TimeSpent(whole_s, own, sum(abandoned), sum(part.evaluation_s for part in parts))


def _seconds(step_ms: Points, first: bool) -> float:
    """first: from step 0 on; else the first logged step stands for as many as the second."""
    steps, took = step_ms.steps, step_ms.values
    if not len(steps):
        return 0.0
    before = 0 if first else steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    counts = np.maximum(np.diff(steps, prepend=before), 0)
    return float((counts * np.where(np.isfinite(took), took, 0.0)).sum()) / 1e3
