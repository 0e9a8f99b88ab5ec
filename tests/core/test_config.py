"""The recipe's schema: nothing is coerced, and keys that contradict each other are refused together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from weftrain.core.config import Recipe, Segment, with_earlier_keys


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("schedule", {"steps": "6"}, "valid integer"),
        ("optimizer", {"beta1": "0.9"}, "valid number"),
        ("model", {"another": 1}, "Extra inputs are not permitted"),
        ("model", {"num_heads": 5}, "is not a multiple of num_heads 5"),
        ("model", {"rotary_dim": 7}, "must be even"),
        ("model", {"mup": None}, "exactly one of 'mup' and 'initialization'"),
        ("model", {"logits_scale": 1.0}, "follow from 'mup'"),
        ("model", {"max_position_embeddings": 2}, "exceeds model.max_position_embeddings 2"),
        ("batch", {"micro_batch_size": 3}, "not a multiple of micro_batch_size x replicas = 3 x 1 = 3"),
        ("schedule", {"steps": 10**6}, "add a segment"),
        ("log", {"sample_prompts": ["a"], "evaluate_every_steps": 0}, "set 'evaluate_every_steps'"),
        ("log", {"stop_at_loss": 3.3, "evaluate_every_steps": 0}, "'stop_at_loss' is of an evaluation"),
        ("log", {"sample_prompts": [""], "evaluate_every_steps": 1}, "at least 1 character"),
        ("log", {"sample_tokens": 1025}, "less than or equal to 1024"),
    ],
)
def test_what_is_refused(section: str, change: dict[str, Any], words: str, tiny_recipe: Callable[..., Recipe]) -> None:
    tree = tiny_recipe("crystal").model_dump(mode="json")
    assert Recipe.from_record(tree) == tiny_recipe("crystal")
    tree[section] |= change
    with pytest.raises(ValidationError, match=words):
        Recipe.model_validate(tree)


def test_a_constant_segment_has_no_end() -> None:
    assert Segment(shape="constant", steps=2, start=0.1).end is None
    for shape, end in (("constant", 0.1), ("linear", None)):
        with pytest.raises(ValidationError, match="'end' is needed for linear and cosine"):
            Segment.model_validate({"shape": shape, "steps": 2, "start": 0.1, "end": end})


def test_a_record_without_an_objective_divided_by_all_positions() -> None:
    assert with_earlier_keys({"name": "x"})["objective"] == {"normalizer": "all_positions"}
    assert (
        with_earlier_keys({"objective": {"normalizer": "bearing_tokens"}})["objective"]["normalizer"] != "all_positions"
    )


def test_a_recipe_without_samples_is_recorded_as_before_there_were_any(tiny_recipe: Callable[..., Recipe]) -> None:
    recorded = tiny_recipe("crystal").model_dump(mode="json")["log"]
    assert recorded.keys() == {"every_steps", "evaluate_every_steps", "evaluate_rows", "tensorboard"}
    asks = ("log.evaluate_every_steps=2", 'log.sample_prompts=["a", "b"]', "log.sample_tokens=7")
    recipe = tiny_recipe("crystal", *asks)
    recorded = recipe.model_dump(mode="json")
    assert (recorded["log"]["sample_prompts"], recorded["log"]["sample_tokens"]) == (["a", "b"], 7)
    assert Recipe.from_record(recorded) == recipe
