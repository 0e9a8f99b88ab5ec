"""The train loss of a comparison: the mean over a window of steps, the same for all series, and only where the whole
window was trained.

A mean over fewer steps than it says would be another figure: early losses are high, and a run of 24 steps has no mean
of 100.
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
    """Steps that the series' logged losses are of."""
    return series.losses[-1][0] - series.losses[0][0] + 1 if series.losses else 0


def default_window(series: Sequence[Series]) -> int:
    """A tenth of the shortest series' steps, at most 100, and not less than its log's interval: so that it lies within
    each of them.
    """
    spans = [logged_steps(one) for one in series if one.losses]
    every = max((one.log_every_steps for one in series if one.losses), default=1)
    shortest = min(spans, default=1)
    return max(1, min(shortest, max(every, min(MOST_STEPS, shortest // _SHARE))))


def windowed(series: Series, window_steps: int) -> Series:
    """The series with its train loss at each point and its curve, as means over so many steps."""
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
    """Mean of the losses of steps (step - window_steps, step].

    None where the window begins before the first logged step, or where the newest loss in it is older than the log's
    own interval.
    """
    last = bisect_right(losses, (step, math.inf, math.inf))
    first = bisect_right(losses, (step - window_steps, math.inf, math.inf))
    if first == last or step - window_steps < losses[0][0] - 1 or losses[last - 1][0] <= step - every_steps:
        return None
    return math.fsum(loss for _, _, loss in losses[first:last]) / (last - first)


def smoothed_curve(losses: Sequence[Loss], window_steps: int) -> list[tuple[int, float]]:
    """(tokens seen, mean over the window that ends there) of every logged step whose whole window was logged; in the
    time of one pass.
    """
    curve, first, total = [], 0, 0.0
    for last, (step, tokens, loss) in enumerate(losses):
        total += loss
        while losses[first][0] <= step - window_steps:
            total -= losses[first][2]
            first += 1
        if step - window_steps >= losses[0][0] - 1:
            curve.append((tokens, total / (last + 1 - first)))
    return curve
