"""Two programs, run alternately round by round: which is faster, how certain that is, and whether they trained alike.

Speeds are compared as in `bench compare`: a ratio, its 95 % interval over the rounds, and a verdict. Losses are
compared at the last step that both programs report.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weftrain.analysis.bench.timings import Difference, difference
from weftrain.analysis.bench.train import BenchError

SAME_LOSS = 1e-3  # closer losses are of the same training: in bf16 the third digit differs after a few steps


@dataclass(frozen=True)
class LossComparison:
    """Largest loss difference of any round at `step`, the last step both report; `missing`: why not later, or ""."""

    step: int
    difference: float
    ours: float  # of the last round
    theirs: float
    missing: str

    @property
    def verdict(self) -> str:
        """One line for people."""
        same = self.difference <= SAME_LOSS
        if self.step == 1:
            words = "the same start" if same else "NOT the same start: read the ratio with care"
        else:
            words = (
                "the same training"
                if same
                else "NOT the same training, or not the same start: read the ratio with care"
            )
        more = f" ({self.missing})" if self.missing else ""
        return (
            f"losses at step {self.step}, the last that both report{more}, differ by at most {self.difference:.2g}: "
            f"{words}"
        )


@dataclass(frozen=True)
class ProgramComparison:
    """ratios: tokens/s of ours over theirs, one a round. speed: the same with its interval; None without one."""

    ratios: tuple[float, ...]
    speed: Difference | None
    losses: LossComparison

    @property
    def ratio(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """What can be said about the speeds: one line for people."""
        if self.speed is None:
            return (
                "no interval, so no verdict: of one round, and a program did not print its step_times_ms: give "
                "--rounds 3"
            )
        return self.speed.verdict


def against(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> ProgramComparison:
    """Compare RESULT lines of as many rounds each, of which the k-th were made one after the other.

    Raises BenchError for different numbers of steps.
    """
    pairs = list(zip(ours, theirs, strict=True))
    for pair in pairs:
        check_steps(*pair)
    ratios = tuple(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
    speed = None
    if len(pairs) > 1 or all("step_times_ms" in one for one in (*ours, *theirs)):
        names = (str(ours[0]["name"]), str(theirs[0]["name"]))
        speed = difference([_ms_per_token(one) for one in ours], [_ms_per_token(one) for one in theirs], names=names)
    return ProgramComparison(ratios, speed, _losses(pairs))


def steps_made(result: Mapping[str, Any]) -> int | None:
    """Steps that a program made, warm-up included; None if its RESULT line does not say."""
    if "losses" in result:
        return len(result["losses"])
    if "last_step" in result:
        return int(result["last_step"])
    counted, warm_up = result.get("steps"), result.get("warm_up_steps")
    return counted + warm_up if type(counted) is int and type(warm_up) is int else None


def check_steps(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Raise BenchError if two programs made different numbers of steps; if one does not say how many, that in words."""
    for one in (ours, theirs):
        if steps_made(one) is None:
            wanted = "have its RESULT line print `losses`, `last_step`, or `steps` and `warm_up_steps`"
            return f"{one['name']} does not say how many steps it made, so they may differ: {wanted}"
    a, b = steps_made(ours), steps_made(theirs)
    if a != b:
        raise BenchError(
            f"{ours['name']} made {a} steps and {theirs['name']} {b}: compare the same number: --steps {b} for "
            f"{ours['name']}, or {a} steps in the other program"
        )
    return ""


def _ms_per_token(result: Mapping[str, Any]) -> list[float]:
    """Milliseconds per token of each counted step, scaled so that the median gives the program's tokens/s."""
    middle = 1e3 / result["tokens_per_second"]
    times = result.get("step_times_ms", [1.0])
    return [middle * value / statistics.median(times) for value in times]


def _losses(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> LossComparison:
    told = [(_by_step(a), _by_step(b)) for a, b in pairs]
    step = max(set.intersection(*({*a} & {*b} for a, b in told)))
    apart = [abs(a[step] - b[step]) for a, b in told]
    worst = next((value for value in apart if value != value), max(apart))  # max() passes over NaN
    ours, theirs = told[-1]
    return LossComparison(step, worst, ours[step], theirs[step], _missing(pairs[-1], max(*ours, *theirs), step))


def _by_step(result: Mapping[str, Any]) -> dict[int, float]:
    """Step number, from 1 -> loss, for the steps that the program reports."""
    if "losses" in result:
        return dict(enumerate(map(float, result["losses"]), 1))
    found = {1: float(result["loss_first"])}
    return found | {result["last_step"]: float(result["loss_last"])} if "last_step" in result else found


def _missing(pair: tuple[Mapping[str, Any], Mapping[str, Any]], last: int, step: int) -> str:
    silent = [str(one["name"]) for one in pair if "losses" not in one and "last_step" not in one]
    if silent:
        return f"{silent[0]} does not report which step its loss_last is of: have it print `losses` or `last_step`"
    return "" if step == last else "one of them reports the losses of single steps only"
