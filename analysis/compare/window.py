"""The train loss of a comparison: the mean over a window of steps, equal for all series, only for complete windows.

A mean over an incomplete window would be another figure: early losses are high, and a run of 24 steps has no mean of
100.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from weftrain.analysis.compare.series import TRAIN_LOSS, Series

MOST_STEPS = 100  # of the default window
_SHARE = 10  # of the shortest series, whose part the window then is

Loss = tuple[int, int, float]  # step, tokens seen, loss


def logged_steps(series: Series) -> int:
    """Number of steps that the logged losses span."""
    return series.losses[-1][0] - series.losses[0][0] + 1 if series.losses else 0


def default_window(series: Sequence[Series]) -> int:
    """A tenth of the shortest series' steps, at most 100 and at least the logging interval, within every series."""
    spans = [logged_steps(one) for one in series if one.losses]
    every = max((one.log_every_steps for one in series if one.losses), default=1)
    shortest = min(spans, default=1)
    return max(1, min(shortest, max(every, min(MOST_STEPS, shortest // _SHARE))))


def windowed(series: Series, window_steps: int) -> Series:
    """The series with its train loss at each point and its curve, as means over `window_steps`."""
    at = {
        point.step: smoothed_at(series.losses, point.step, window_steps, series.log_every_steps)
        for point in series.points
    }
    points = tuple(
        point if (loss := at[point.step]) is None else replace(point, values={**point.values, TRAIN_LOSS: loss})
        for point in series.points
    )
    return replace(series, points=points, curve=tuple(smoothed_curve(series.losses, window_steps)))


def smoothed_at(losses: Sequence[Loss], step: int, window_steps: int, every_steps: int) -> float | None:
    """Mean loss of steps (step - window_steps, step].

    None where the window begins before the first logged step, or its newest loss is older than the logging interval.
    """
    last = bisect_right(losses, (step, math.inf, math.inf))
    first = bisect_right(losses, (step - window_steps, math.inf, math.inf))
    if first == last or step - window_steps < losses[0][0] - 1 or losses[last - 1][0] <= step - every_steps:
        return None
    return math.fsum(loss for _, _, loss in losses[first:last]) / (last - first)


def smoothed_curve(losses: Sequence[Loss], window_steps: int) -> list[tuple[int, float]]:
    """(tokens seen, mean over the window ending there) of each logged step with a complete window, in one pass."""
    curve, first, total = [], 0, 0.0
    for last, (step, tokens, loss) in enumerate(losses):
        total += loss
        while losses[first][0] <= step - window_steps:
            total -= losses[first][2]
            first += 1
        if step - window_steps >= losses[0][0] - 1:
            curve.append((tokens, total / (last + 1 - first)))
    return curve
