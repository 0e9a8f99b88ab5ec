"""The limits of `optimizer.non_finite: skip`: steps in a row, and their share, over restarts too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from weftrain.core.config import Recipe
from weftrain.core.run.skip_limits import SkipLimits

Tiny = Callable[..., Recipe]


def stopped_at(
    recipe: Recipe, skipped: Sequence[int], start: int = 0, before: Sequence[int] = ()
) -> tuple[int, str] | None:
    """The first completed step after which a limit is exceeded, and its words. skipped: the steps left out, counted
    from 1.
    """
    limits = SkipLimits(recipe, start, before)
    for completed in range(start + 1, recipe.schedule.steps + 1):
        if (words := limits.exceeded(completed, completed in skipped)) is not None:
            return completed, words
    return None


@pytest.mark.parametrize(
    ("steps", "skipped", "at", "words"),
    [
        (40, range(2, 41), 6, "5 of 40 steps were skipped, and optimizer.max_skip_share is 0.1"),  # 4 of 40 are allowed
        (40, (3, 9, 20, 39), None, ""),
        (300, range(50, 300), 60, "11 steps in a row"),
        (300, range(1, 300, 10), None, ""),  # every tenth: never more than 10 of any 100
        (300, range(1, 300, 9), 91, "11 of 100"),  # 1, 10, .. 91
        (5, (5,), 5, "1 of 5"),
    ],
)
def test_the_share_of_the_last_100_steps(
    steps: int, skipped: Sequence[int], at: int | None, words: str, tiny_recipe: Tiny
) -> None:
    found = stopped_at(tiny_recipe("crystal", f"schedule.steps={steps}"), skipped)
    assert (found is None) == (at is None)
    if found is not None:
        assert found[0] == at
        assert words in found[1]


def test_steps_in_a_row(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe(
        "crystal", "schedule.steps=50", "optimizer.max_skip_share=1.0", "optimizer.max_consecutive_skips=3"
    )
    assert stopped_at(recipe, (5, 6, 7, 9, 10, 11)) is None
    found = stopped_at(recipe, (5, 6, 8, 9, 10, 11))
    assert found == (11, "4 steps in a row were skipped, and optimizer.max_consecutive_skips is 3")


def test_what_was_skipped_before_a_restart_counts(tiny_recipe: Tiny) -> None:
    row = tiny_recipe(
        "crystal", "schedule.steps=50", "optimizer.max_skip_share=1.0", "optimizer.max_consecutive_skips=3"
    )
    found = stopped_at(row, (21, 22), start=20, before=(3, 19, 20))
    assert found == (22, "4 steps in a row were skipped, and optimizer.max_consecutive_skips is 3")
    assert stopped_at(row, (21, 22), start=20, before=(3, 18, 19)) is None
    share = tiny_recipe("crystal", "schedule.steps=50", "optimizer.max_skip_share=0.1")  # 5 of 50
    assert stopped_at(share, (30,), start=20, before=(1, 3, 5, 7, 9)) is not None
    assert stopped_at(share, (30,), start=20, before=(1, 3, 5, 7)) is None
    many = tiny_recipe("crystal", "schedule.steps=500", "optimizer.max_skip_share=0.01")
    assert stopped_at(many, (130,), start=120, before=(30,)) is None  # 100 steps ago
    assert stopped_at(many, (130,), start=120, before=(31,)) is not None
