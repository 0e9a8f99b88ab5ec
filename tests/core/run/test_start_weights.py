"""Tensors that are not the model's are refused by name, shape and key; what may change is named by a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from weftrain.core.checkpoint import Weights
from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError
from weftrain.core.initialization import draw
from weftrain.core.model_config import ChangeableKey
from weftrain.core.parameters import parameter_specs
from weftrain.core.run.start_weights import WHOLE_STATE, GrownWeights, check_fit, check_function, grown_rows

Tiny = Callable[..., Recipe]


def manifest_of(recipe: Recipe, *planes: str) -> dict[str, Any]:
    tensors = {
        f"{plane}/{spec.name}": {"dtype": "F32", "shape": list(spec.shape)}
        for plane in planes or ("weights",)
        for spec in parameter_specs(recipe.model)
    }
    return {"step": 4, "recipe": recipe.model_dump(mode="json"), "tensors": tensors}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.intermediate_size=72", ["gate_proj", "[70, 48]", "[72, 48]", "model.intermediate_size: 70 -> 72"]),
        ("model.num_layers=1", ["layers.1.", "is not in the model", "model.num_layers: 2 -> 1"]),
        ("model.num_layers=3", ["layers.2.", "is missing", "model.num_layers: 2 -> 3"]),
        ("model.tie_embeddings=true", ["head.weight", "is not in the model", "model.tie_embeddings: False -> True"]),
        ("model.linear_bias=true", [".bias", "is missing", "model.linear_bias: False -> True"]),
        ("model.vocab_size=128", ["embedding.weight", "[97, 48]", "[128, 48]", "model.vocab_size: 97 -> 128"]),
    ],
)
def test_another_shape_is_named_with_both_shapes_and_the_key(tiny_recipe: Tiny, change: str, words: list[str]) -> None:
    manifest = manifest_of(tiny_recipe("amber"))
    with pytest.raises(CheckpointError) as caught:
        check_fit(manifest, tiny_recipe("amber", change).model, "here")
    assert all(word in str(caught.value) for word in ["here: does not fit", *words]), str(caught.value)


def test_every_plane_that_is_used_is_checked(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber")
    whole = manifest_of(recipe, *WHOLE_STATE)
    check_fit(whole, recipe.model, "here", WHOLE_STATE)
    del whole["tensors"]["exp_avg/final_norm.weight"]
    check_fit(whole, recipe.model, "here")
    with pytest.raises(CheckpointError, match=r"'exp_avg/final_norm.weight' of shape \[48\] is missing"):
        check_fit(whole, recipe.model, "here", WHOLE_STATE)
    whole["tensors"]["weights/final_norm.weight"]["dtype"] = "BF16"
    with pytest.raises(CheckpointError, match=r"is BF16 \[48\], the model's is F32 \[48\]"):
        check_fit(whole, recipe.model, "here")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("amber", "rope_theta", "500.0"),
        ("amber", "norm_eps", "1.0e-3"),
        ("amber", "num_heads", "6"),
        ("amber", "rotary_dim", "8"),
        ("amber", "rotary_interleaved", "true"),
        ("amber", "attention_scale", "inverse_head_dim"),
        ("amber", "logits_scale", "0.5"),
        ("crystal", "logits_scale", None),  # by muP: another base width
        ("moe", "experts", "3"),
    ],
)
def test_another_function_of_the_same_shapes_is_refused_unless_named(
    tiny_recipe: Tiny, family: str, key: str, value: str | None
) -> None:
    changed = f"model.{key}={value}" if value is not None else "model.mup.base_hidden_size=24"
    changed = f"model.experts.top_k={value}" if key == "experts" else changed
    more = ["model.rotary_dim=8"] if key == "num_heads" else []
    manifest = manifest_of(tiny_recipe(family, *more))
    model = tiny_recipe(family, *more, changed).model
    check_fit(manifest, model, "here")
    with pytest.raises(CheckpointError, match=rf"model\.{key}: .* -> .*start_from.change=\[{key}\]"):
        check_function(manifest, model, "here", ())
    assert key in get_args(ChangeableKey)  # what is advised must be taken
    (line,) = check_function(manifest, model, "here", (key,))
    assert line.startswith(f"model.{key}: ")


def test_another_number_of_experts_does_not_fit(tiny_recipe: Tiny) -> None:
    manifest, other = manifest_of(tiny_recipe("moe")), tiny_recipe("moe", "model.experts.count=6").model
    words = (
        r"router\.weight' is F32 \[8, 48\], the model's is F32 \[6, 48\] .*experts: \{'count': 8\} -> \{'count': 6\}"
    )
    with pytest.raises(CheckpointError, match=words):
        check_fit(manifest, other, "here")


def test_what_is_no_part_of_the_function_may_differ(tiny_recipe: Tiny) -> None:
    manifest = manifest_of(tiny_recipe("amber"))
    model = tiny_recipe(
        "amber", "model.max_position_embeddings=32", "model.dropout=0.1", "model.initialization.matrix_std=0.5"
    ).model
    assert check_function(manifest, model, "here", ()) == []


def test_a_grown_vocabulary_keeps_its_rows_and_draws_the_others(tiny_recipe: Tiny) -> None:
    recipe, larger = tiny_recipe("amber"), tiny_recipe("amber", "model.vocab_size=100").model
    manifest = manifest_of(recipe)
    check_fit(manifest, larger, "here", grow=["vocab_size"])
    with pytest.raises(CheckpointError):  # no model shrinks
        check_fit(manifest_of(tiny_recipe("amber", "model.vocab_size=100")), recipe.model, "here", grow=["vocab_size"])
    rows = grown_rows(manifest, larger)
    assert rows == {"embedding.weight": (97, 100), "head.weight": (97, 100)}
    specs = {spec.name: spec for spec in parameter_specs(larger)}
    old = {f"weights/{spec.name}": torch.full(spec.shape, 2.0) for spec in parameter_specs(recipe.model)}
    weights = GrownWeights(Weights(old), rows, larger, seed=3)
    assert weights.keys() == specs.keys()
    assert all(weights[name].shape == spec.shape for name, spec in specs.items())
    assert (weights["head.weight"][:97] == 2).all()
    assert torch.equal(weights["head.weight"][97:], draw(specs["head.weight"], larger, 3)[97:])
    assert (weights["final_norm.weight"] == 2).all()
