"""A plan of changes: the recipe at each step is a function of the recipe, and what cannot change is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from weftrain.core.backend import plan_of
from weftrain.core.changes import refused
from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.recipe_file import recorded_recipe

Tiny = Callable[..., Recipe]
PLAN = "changes=[{step: 4, set: {batch.global_batch_size: 8}}, {step: 6, set: {optimizer.weight_decay: 0.5}}]"


def planned(tiny_recipe: Tiny, *changes: dict[str, Any], steps: int = 10) -> Recipe:
    return tiny_recipe("crystal", f"schedule.steps={steps}", f"changes={json.dumps(list(changes))}")


def test_the_recipe_at_a_step_is_the_one_with_the_changes_due_and_the_later_ones_planned(tiny_recipe: Tiny) -> None:
    plain, recipe = tiny_recipe("crystal", "schedule.steps=10"), tiny_recipe("crystal", "schedule.steps=10", PLAN)
    assert recipe.at(3) == recipe
    assert recipe.at(4).batch.global_batch_size == 8
    assert [change.step for change in recipe.at(4).changes] == [6]
    assert recipe.at(4).at(7) == recipe.at(7) == recipe.at(6)
    assert recipe.at(6).changes == ()
    by_hand = tiny_recipe("crystal", "schedule.steps=10", "batch.global_batch_size=8", "optimizer.weight_decay=0.5")
    assert recipe.at(6) == by_hand
    assert "changes" not in plain.model_dump()
    assert Recipe.from_record(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


def test_a_plan_ends_at_the_next_change_with_a_checkpoint_and_without_an_evaluation_of_its_own(
    tiny_recipe: Tiny,
) -> None:
    recipe = tiny_recipe(
        "crystal", "schedule.steps=10", PLAN, "log.evaluate_every_steps=5", "checkpoint={every_steps: 0, at_end: false}"
    )
    ends = [plan_of(recipe.at(step), step).last_step for step in range(10)]
    assert ends == [4] * 4 + [6] * 2 + [10] * 4
    first, last = plan_of(recipe, 0), plan_of(recipe.at(6), 6)
    assert first.wants_state(4)
    assert not first.wants_evaluation(4)
    assert last.wants_evaluation(10)
    assert not last.wants_state(10)


def test_a_change_may_add_a_source_and_a_row_to_skip(tiny_recipe: Tiny) -> None:
    source = {"name": "b", "path": "b", "weight": 0.5}
    change = {"data.sources.1": source, "data.sources.0.weight": 0.5, "data.skip.0": {"reason": "x"}}
    with pytest.raises(
        RecipeError, match=r"changes\.0 \(step 2\): key 'data\.skip\.0'"
    ):  # a skip rule of a reason alone
        with_sources(tiny_recipe, {"step": 2, "set": change})
    change["data.skip.0"] = {"reason": "x", "source": "a", "rows": [0, 2]}
    recipe = with_sources(tiny_recipe, {"step": 2, "set": change})
    assert [one.name for one in recipe.at(2).data.sources] == ["a", "b"]


def with_sources(tiny_recipe: Tiny, *changes: dict[str, Any]) -> Recipe:
    tree = tiny_recipe("crystal").model_dump(mode="json")
    tree["data"] |= {"synthetic_rows": None, "sources": [{"name": "a", "path": "a", "weight": 1.0}]}
    return recorded_recipe(tree | {"changes": list(changes)}, "here").recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 2, "set": {"seed": 3}}, "'seed' cannot be changed within a run: it belongs to the run as a whole"),
        ({"step": 2, "set": {"model.num_layers": 3}}, "'model.num_layers' cannot .* it decides the shape"),
        ({"step": 2, "set": {"model": {}}}, "'model' cannot .*"),
        ({"step": 2, "set": {"data": {}}}, "'data' cannot .* name the keys of it that change"),
        ({"step": 2, "set": {"backend.name": "null"}}, "go on with --backend"),
        ({"step": 2, "set": {"batch.replicas": 2}}, "start as many again"),
        ({"step": 2, "set": {"data.shuffle_seed": 3}}, "would come again in another order"),
        ({"step": 2, "set": {"data.continues.step": 3}}, "`train` writes it"),
        ({"step": 2, "set": {"batch.size": 3}}, r"changes\.0 \(step 2\): key 'batch\.size'"),
        ({"step": 2, "set": {"batch.global_batch_size": 3}}, "is not a multiple of micro_batch_size x replicas"),
        ({"step": 2, "set": {"schedule.learning_rate.7.start": 3}}, "there is no key 'schedule.learning_rate.7.start'"),
        ({"step": 10, "set": {"optimizer.beta1": 0.5}}, r"step 10 is not in 1\.\.9"),
        ({"step": 0, "set": {"optimizer.beta1": 0.5}}, "greater than 0"),
        ({"step": 2, "set": {}}, "changes.0.set"),
    ],
)
def test_what_cannot_change_is_refused_with_the_reason(change: dict[str, Any], message: str, tiny_recipe: Tiny) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(tiny_recipe, change)


def test_changes_come_in_order_and_one_a_step(tiny_recipe: Tiny) -> None:
    one, two = {"step": 4, "set": {"optimizer.beta1": 0.5}}, {"step": 4, "set": {"optimizer.beta2": 0.5}}
    with pytest.raises(RecipeError, match=r"changes\.1: step 4 is not in 5\.\.9: give changes in order, one a step"):
        planned(tiny_recipe, one, two)


def test_a_change_may_make_the_run_longer_for_those_after_it(tiny_recipe: Tiny) -> None:
    rate = [{"shape": "constant", "steps": 20, "start": 0.1}]
    longer = {"step": 4, "set": {"schedule.steps": 20, "schedule.learning_rate": rate}}
    recipe = planned(tiny_recipe, longer, {"step": 15, "set": {"optimizer.beta1": 0.5}})
    assert plan_of(recipe.at(4), 4).last_step == 15
    assert plan_of(recipe.at(15), 15).last_step == 20


def test_every_section_of_a_recipe_is_known_to_the_plan(tiny_recipe: Tiny) -> None:
    """A key that no rule names may change; those that decide what the weights are may not."""
    free = [key for key in tiny_recipe("crystal").model_dump() if not refused(f"{key}.x")]
    assert free == [
        "objective",
        "optimizer",
        "schedule",
        "precision",
        "data",
        "batch",
        "kernels",
        "backend",
        *(
            "checkpoint",
            "log",
        ),
    ]
    assert not refused("model.rope_theta")
    assert not refused("model.rotary_scaling.factor")
