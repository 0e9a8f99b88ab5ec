"""Short forms of a recipe: lengths in tokens and epochs, parts of the learning rate, and ramps of the batch size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core.written_datasets import VOCAB, S, make_dataset
from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.recipe_file import load_recipe, recorded_recipe

Tiny = Callable[..., Recipe]
LENGTH = 13  # tokens of a row of the cut recipe
FLAT = "schedule.learning_rate=[{shape: constant, rest: true, start: 0.1}]"


def batch(size: int = 8, ramp: str = "") -> str:
    return f"batch={{global_batch_size: {size}, micro_batch_size: 2{ramp}}}"


def test_a_length_in_tokens_is_the_steps_that_read_so_many(tiny_recipe: Tiny) -> None:
    steps = [
        tiny_recipe("crystal", f"schedule.tokens={tokens}", batch(), FLAT).schedule.steps
        for tokens in (1, 8 * LENGTH, 8 * LENGTH + 1, 1e4)
    ]
    assert steps == [1, 1, 2, 97]


def test_a_ramp_is_changes_of_the_batch_in_equal_parts_and_its_tokens_are_counted(tiny_recipe: Tiny) -> None:
    ramp = ", ramp: {from: 2, increment: 2, steps: 9}"
    recipe = tiny_recipe("crystal", "schedule.steps=20", batch(8, ramp), FLAT)
    assert recipe.batch.global_batch_size == 2
    assert [(one.step, one.set["batch.global_batch_size"]) for one in recipe.changes] == [(3, 4), (6, 6), (9, 8)]
    read = 3 * (2 + 4 + 6)  # rows of the ramp
    for rows, steps in ((read + 1, 10), (read + 8, 10), (read + 9, 11)):
        assert tiny_recipe("crystal", f"schedule.tokens={rows * LENGTH}", batch(8, ramp), FLAT).schedule.steps == steps


def test_a_ramp_goes_beside_other_changes(tiny_recipe: Tiny) -> None:
    ramp = ", ramp: {from: 4, increment: 4, steps: 3}"
    other = "changes=[{step: 3, set: {optimizer.beta1: 0.8}}, {step: 5, set: {optimizer.beta1: 0.7}, reason: late}]"
    recipe = tiny_recipe("crystal", "schedule.steps=9", batch(8, ramp), other, FLAT)
    assert [(one.step, one.set, one.reason) for one in recipe.changes] == [
        (3, {"batch.global_batch_size": 8, "optimizer.beta1": 0.8}, None),
        (5, {"optimizer.beta1": 0.7}, "late"),
    ]


def test_parts_of_the_learning_rate_in_shares_tokens_and_the_rest(tiny_recipe: Tiny) -> None:
    parts = [
        "{shape: linear, share: 0.1, start: 0.0, end: 0.1}",
        "{shape: constant, rest: true, start: 0.1}",
        f"{{shape: one_minus_sqrt, tokens: {20 * 8 * LENGTH}, start: 0.1, end: 0.0}}",
    ]
    recipe = tiny_recipe("crystal", "schedule.steps=203", batch(), f"schedule.learning_rate=[{', '.join(parts)}]")
    assert [part.steps for part in recipe.schedule.learning_rate] == [20, 163, 20]
    thirds = ", ".join(["{shape: constant, share: 0.3333333333333333, start: 0.1}"] * 3)
    recipe = tiny_recipe("crystal", "schedule.steps=100", batch(), f"schedule.learning_rate=[{thirds}]")
    assert [part.steps for part in recipe.schedule.learning_rate] == [33, 33, 34]


def test_a_length_in_epochs_is_counted_in_the_datasets_rows(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [41])
    make_dataset(tmp_path / "b", [10], first_id=20_000)

    def steps(sources: str, epochs: float, skip: str = "[]") -> int:
        data = f"{{root: {tmp_path}, sequence_length: {S}, shuffle_seed: 1, sources: {sources}, skip: {skip}}}"
        small = (f"model.vocab_size={VOCAB}", batch(), FLAT, f"data={data}", f"schedule.epochs={epochs}")
        return load_recipe("crystal_demo", small).recipe.schedule.steps

    one = "[{name: a, path: a, weight: 1}]"
    assert [steps(one, epochs) for epochs in (1, 2, 0.5)] == [6, 11, 3]
    assert steps(one, 2, "[{source: a, rows: [0, 9], reason: noise}]") == 8
    two = "[{name: a, path: a, epochs: 2}, {name: b, path: b, epochs: 1}]"
    assert steps(two, 1) == 12
    with pytest.raises(RecipeError, match="give each source epochs instead of weight"):
        steps("[{name: a, path: a, weight: 0.5}, {name: b, path: b, weight: 0.5}]", 1)
    with pytest.raises(RecipeError, match=r"counted in the rows of the datasets: .*no dataset for source 'c'"):
        steps("[{name: c, path: c, weight: 1}]", 1)


def test_an_override_gives_the_length_in_its_own_unit(tiny_recipe: Tiny) -> None:
    tree = tiny_recipe("crystal", "schedule.steps=9").model_dump(mode="json")
    tree["schedule"] |= {"tokens": 1e9}
    with pytest.raises(RecipeError, match="schedule gives steps and tokens: give one of them"):
        recorded_recipe(tree, "here")
    assert recorded_recipe(tree, "here", ["schedule.steps=9"]).recipe.schedule.steps == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("schedule.tokens=0",), r"schedule.tokens: should be a number > 0, not 0"),
        (("schedule.tokens=many",), r"schedule.tokens: should be a number > 0, not 'many'"),
        ((batch(8, ", ramp: {from: 3, increment: 2, steps: 9}"),), "must be larger by a multiple of increment"),
        ((batch(8, ", ramp: {from: 2, increment: 2, steps: 2}"),), "each size last a step or more"),
        ((batch(8, ", ramp: {from: 2, increment: 2}"),), r"missing key 'steps'"),
        (
            (
                batch(8, ", ramp: {from: 2, increment: 2, steps: 3}"),
                "changes=[{step: 7, set: {batch.global_batch_size: 2}}]",
            ),
            "both changes and batch.ramp set batch.global_batch_size",
        ),
        (
            ("schedule.learning_rate=[{shape: constant, rest: true, share: 0.1, start: 1}]",),
            "give one of steps, tokens",
        ),
        (
            (
                "schedule.learning_rate=[{shape: constant, steps: 9, start: 1}, {shape: constant, rest: true, start: 1}]",
                "schedule.steps=9",
            ),
            "the other segments come to 9 of 9 steps",
        ),
    ],
)
def test_what_no_length_follows_from_is_refused(overrides: tuple[str, ...], message: str, tiny_recipe: Tiny) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe("crystal", *overrides)
