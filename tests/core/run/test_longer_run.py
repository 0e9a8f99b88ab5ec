"""The overrides that make a complete run twice as long, or what must be decided first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.run.longer_run import LongerRun, longer_run

Tiny = Callable[..., Recipe]


def longer(recipe: Recipe, folder: Path, overrides: list[str], make: Callable[..., Recipe]) -> LongerRun | str:
    steps = recipe.schedule.steps
    return longer_run(folder, recipe, training_source(recipe), steps, overrides, lambda given: make("crystal", *given))


def test_an_earlier_override_of_the_steps_is_replaced(tiny_recipe: Tiny, tmp_path: Path) -> None:
    rate = "schedule.learning_rate=[{shape: constant, steps: 4, start: 0.5}]"
    recipe = tiny_recipe("crystal", rate, "schedule.steps=4")
    found = longer(recipe, tmp_path, [rate, "schedule.steps=4"], tiny_recipe)
    more = "schedule.learning_rate.1={shape: constant, steps: 4, start: 0.5}"
    assert isinstance(found, LongerRun)
    assert (found.steps, found.overrides) == (8, (rate, "schedule.steps=8", more))
    assert "schedule.steps" in found.allow


def test_a_learning_rate_that_ends_at_zero_must_be_chosen(tiny_recipe: Tiny, tmp_path: Path) -> None:
    rate = "schedule.learning_rate=[{shape: linear, steps: 4, start: 0.5, end: 0.0}]"
    recipe = tiny_recipe("crystal", rate, "schedule.steps=4")
    found = longer(recipe, tmp_path, [rate, "schedule.steps=4"], tiny_recipe)
    assert found == (
        "the learning rate ends at 0, so more steps need one: add schedule.steps=8 and "
        "'schedule.learning_rate.1={shape: constant, steps: 4, start: RATE}'"
    )
