"""The section `evaluations`: what may stand in it, and that a recipe without it keeps its hash."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from weftrain.core.backend import plan_of
from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError

Tiny = Callable[..., Recipe]


def test_a_recipe_without_evaluations_is_recorded_as_before(tiny_recipe: Tiny) -> None:
    assert "evaluations" not in tiny_recipe("amber").model_dump()
    assert "evaluate_at_start" not in tiny_recipe("amber").model_dump()["log"]
    recipe = tiny_recipe("amber", "evaluations=[{name: t, every_steps: 5, tasks: [a]}]", "log.evaluate_at_start=true")
    assert Recipe.from_record(recipe.model_dump(mode="json")) == recipe
    assert recipe.model_dump()["log"]["evaluate_at_start"]


@pytest.mark.parametrize(
    ("evaluation", "problem"),
    [
        ("{name: t, every_steps: 5}", "give exactly one of 'tasks', 'preset' and 'datasets'"),
        ("{name: t, every_steps: 5, tasks: [a], datasets: [b]}", "give exactly one of"),
        ("{name: t, every_steps: 5, datasets: [b], shots: 1}", "'shots' and 'include' are of tasks"),
        ("{name: t, every_steps: 5, preset: llm360, shots: 1}", "a preset says how many 'shots'"),
        ("{name: t, every_steps: 5, tasks: [a, a]}", "named twice"),
        ("{name: a/b, every_steps: 5, tasks: [a]}", "a path where one plain name is meant"),
        ("{name: t, every_steps: 5, datasets: [../b]}", "no segment may be empty, '.' or '..'"),
        ("{name: t, every_steps: 5, tasks: [a]}, {name: t, every_steps: 5, tasks: [b]}", "two have the name 't'"),
        ("{name: t, every_steps: 5, tasks: [a], where: side}", "5 is no multiple of checkpoint.every_steps 2"),
    ],
)
def test_what_contradicts_itself_is_refused(tiny_recipe: Tiny, evaluation: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(problem)):
        tiny_recipe("amber", f"evaluations=[{evaluation}]", "checkpoint.every_steps=2")


def test_the_plan_names_the_steps_of_every_evaluation(tiny_recipe: Tiny) -> None:
    evaluations = (
        "evaluations=[{name: t, every_steps: 4, tasks: [a]}, {name: s, every_steps: 2, tasks: [a], where: side}]"
    )
    plan = plan_of(tiny_recipe("amber", evaluations, "checkpoint.every_steps=2", "schedule.steps=6"), 0)
    assert [step for step in range(1, 7) if plan.wants_scores(step)] == [4, 6]
