"""When too many steps were skipped: the limits of `optimizer.non_finite: skip`, over the line of steps that counts.

A step is *completed* whether it was skipped or not; an *update* is one that was not. Steps are counted across restarts:
the ledger has a line for each skipped one, and what a rollback or restart left behind does not count.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from weftrain.core.config import Recipe

WINDOW_STEPS = 100  # that optimizer.max_skip_share is a share of; all steps of the run where it has fewer


class SkipLimits:
    """Follows the steps of a run from start_step on. skipped: the steps skipped, ascending; later ones do not count."""

    def __init__(self, recipe: Recipe, start_step: int, skipped: Sequence[int]) -> None:
        self._most_in_a_row = recipe.optimizer.max_consecutive_skips
        self._share = recipe.optimizer.max_skip_share
        self._window = min(WINDOW_STEPS, recipe.schedule.steps)
        before = [step for step in skipped if step <= start_step]
        self._recent = deque(step for step in before if step > start_step - self._window)
        self._in_a_row = 0
        while self._in_a_row < len(before) and before[-1 - self._in_a_row] == start_step - self._in_a_row:
            self._in_a_row += 1

    def exceeded(self, completed: int, skipped: bool) -> str | None:
        """Count the step that completed `completed` steps. Which limit it exceeds, in words; None for none."""
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if not skipped:
            return None
        self._recent.append(completed)
        while self._recent[0] <= completed - self._window:
            self._recent.popleft()
        if self._in_a_row > self._most_in_a_row:
            return (
                f"{self._in_a_row} steps in a row were skipped, and optimizer.max_consecutive_skips is "
                f"{self._most_in_a_row}"
            )
        count = len(self._recent)
        if count > math.floor(self._share * self._window + 1e-9):
            return f"{count} of {self._window} steps were skipped, and optimizer.max_skip_share is {self._share:g}"
        return None
