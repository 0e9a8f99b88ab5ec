"""Statistics of step times: percentiles, the end of the warm-up, intervals, and whether two sets of rounds differ.

Steps of one process resemble each other more than two processes do, so an interval from one process describes that
process only. Rounds, each a process of its own, are resampled first, and steps within them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
_LEAST_NOISE = 0.005  # of a step's time: below it a difference is not worth a step


def warm_up_steps(step_ms: Sequence[float]) -> int:
    """Number of first steps that are not yet at the level of the rest: at least one, at most half.

    The change point k that minimizes the absolute deviation of the later log times from their median, where each step
    given up costs three standard deviations of the second half. A slow step is excluded; noise is not.
    """
    logs = np.log(np.asarray(step_ms, dtype=np.float64))
    if len(logs) < 4:
        return min(1, max(0, len(logs) - 1))
    settled = logs[len(logs) // 2 :]
    noise = max(1.4826 * float(np.median(np.abs(settled - np.median(settled)))), _LEAST_NOISE)

    def cost(first: int) -> float:
        rest = logs[first:]
        return float(np.abs(rest - np.median(rest)).sum()) + 3 * noise * first

    return min(range(1, len(logs) // 2 + 1), key=cost)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest values."""
    return float(np.quantile(np.asarray(values, dtype=np.float64), share))


@dataclass(frozen=True)
class Interval:
    """95 % bootstrap interval of a median; rounds: number of processes it comes from."""

    low: float
    high: float
    rounds: int


def _medians(rounds: Sequence[Sequence[float]], generator: np.random.Generator) -> np.ndarray:
    """RESAMPLES medians: rounds are resampled, and blocks of neighbouring steps within each.

    They are medians of the rounds' medians, so a round counts once however many steps it has.
    """
    number = len(rounds)
    of_round = np.stack(
        [_resampled_medians(np.asarray(values, dtype=np.float64), (RESAMPLES, number), generator) for values in rounds]
    )
    chosen = generator.integers(0, number, (RESAMPLES, number))
    return np.asarray(np.median(np.take_along_axis(of_round, chosen[None], axis=0)[0], axis=1))


def _resampled_medians(values: np.ndarray, shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """[*shape] medians of block resamples of one round."""
    count = len(values)
    block = max(1, round(count ** (1 / 3)))
    starts = generator.integers(0, count, (*shape, -(-count // block)))
    places = (starts[..., None] + np.arange(block)).reshape(*shape, -1)[..., :count] % count
    return np.asarray(np.median(values[places], axis=-1))


def median_interval(rounds: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Interval of the median step time over rounds."""
    low, high = np.quantile(_medians(rounds, np.random.default_rng(seed)), (0.025, 0.975))
    return Interval(float(low), float(high), len(rounds))


@dataclass(frozen=True)
class Difference:
    """The ratio of step times of B to A (above 1: B is slower), its 95 % interval, and the verdict these allow."""

    ratio: float
    low: float
    high: float
    verdict: str


def difference(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0, names: tuple[str, str] = ("A", "B")
) -> Difference:
    """Compare rounds of step times; with equally many rounds, the k-th of each were made together and form a pair.

    names: of A and B in the verdict.
    """
    generator = np.random.default_rng(seed)
    paired = len(a) == len(b) and len(a) > 1
    if paired:
        logs = np.array([math.log(statistics.median(y) / statistics.median(x)) for x, y in zip(a, b, strict=True)])
        centre = float(np.median(logs))
        # Student's t on the pairs' log ratios: the bootstrap of so few rounds is too narrow.
        half = _student_95(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        within = np.log(_medians(b, generator)) - np.log(_medians(a, generator))
        half = max(half, float(np.quantile(np.abs(within - within.mean()), 0.95)) / math.sqrt(len(logs)))
        middle = float(logs.mean())
        low, high = math.exp(middle - half), math.exp(middle + half)
        ratio = math.exp(centre)
    else:
        ratios = _medians(b, generator) / _medians(a, generator)
        low, high = (float(value) for value in np.quantile(ratios, (0.025, 0.975)))
        ratio = statistics.median(map(statistics.median, b)) / statistics.median(map(statistics.median, a))
    if low > 1:
        verdict = f"{names[1]} is slower by {ratio - 1:.1%} (95 %: {low - 1:+.1%} to {high - 1:+.1%})"
    elif high < 1:
        verdict = (
            f"{names[1]} is faster by {1 - ratio:.1%} of {names[0]}'s step time (95 %: {low - 1:+.1%} to "
            f"{high - 1:+.1%})"
        )
    else:
        verdict = f"no difference at 95 % ({low - 1:+.1%} to {high - 1:+.1%})"
    if len(a) == 1 or len(b) == 1:
        verdict += "; of one round each: how much the same program varies between processes is not in it"
    return Difference(ratio, low, high, verdict)


# two-sided, 1 to 10 degrees of freedom
_STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _student_95(freedom: int) -> float:
    return _STUDENT_95[freedom - 1] if freedom <= len(_STUDENT_95) else 2.0
