"""Where a figure that changes smoothly along a series does not: a change is judged by those around it.

The scale is the median of the changes nearby, on that side where they are larger. So neither the fast change at the
beginning of a training is a jump, nor a series that becomes sparser, nor noise that is the same everywhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

_WINDOW = 5  # changes on each side
_MIN_BEFORE = 3  # changes before one, without which there is nothing to judge it by
RATIO = 10.0  # how many times the scale a jump is


def jumps(values: Sequence[float], floor: float, ratio: float = RATIO) -> list[int]:
    """Indices i such that the change from values[i] to values[i + 1] is a jump. floor: what is none in any case.

    Values that are not finite take part in no change.
    """
    changes = [abs(after - before) for before, after in pairwise(values)]
    return [index for index in range(len(changes)) if is_jump(changes, index, floor, ratio)]


def is_jump(changes: Sequence[float], index: int, floor: float, ratio: float = RATIO) -> bool:
    """Whether one change stands out. Its direct neighbours are left out: one wrong revision makes two changes."""
    if not math.isfinite(changes[index]) or changes[index] <= floor:
        return False
    before = [change for change in changes[max(0, index - 1 - _WINDOW) : max(0, index - 1)] if math.isfinite(change)]
    after = [change for change in changes[index + 2 : index + 2 + _WINDOW] if math.isfinite(change)]
    if len(before) < _MIN_BEFORE:
        return False
    scale = max(statistics.median(before), statistics.median(after) if len(after) >= _MIN_BEFORE else 0.0)
    return changes[index] > ratio * scale


def outliers(found: Sequence[int]) -> list[tuple[int, int]]:
    """Jumps as (first, last) index of values: two in a row are one value that stands alone, from itself to itself."""
    result = []
    index = 0
    while index < len(found):
        if index + 1 < len(found) and found[index + 1] == found[index] + 1:
            result.append((found[index] + 1, found[index] + 1))
            index += 2
        else:
            result.append((found[index], found[index] + 1))
            index += 1
    return result
