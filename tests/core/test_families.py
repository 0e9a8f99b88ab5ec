"""The open model families: logits bit for bit those of `transformers`, every wrong choice visible, every gradient
against float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, their_model
from model_cases import decoder, large_weights, tokens
from torch import Tensor

from weftrain.core.model_config import ModelConfig

pytest.importorskip("transformers")
SHAPES = [(2, 33), (1, 1), (3, 64)]


def logits_of(config: ModelConfig, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    with torch.no_grad():
        return decoder(config, weights).logits(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_bit_for_bit(name: str) -> None:
    family = FAMILIES[name]
    weights = large_weights(family.ours)
    theirs = their_model(family, weights)
    for shape in SHAPES:
        ids = tokens(family.ours, *shape)
        with torch.no_grad():
            expected = theirs(ids).logits
        found = logits_of(family.ours, weights, ids)
        assert torch.equal(found, expected), (shape, (found - expected).abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_gradient_agrees_with_float64(name: str) -> None:
    family = FAMILIES[name]
    weights = large_weights(family.ours)
    ids, labels = tokens(family.ours, 2, 33), tokens(family.ours, 2, 33, seed=2)
    exact = their_model(family, weights).double()
    F.cross_entropy(exact(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model = decoder(family.ours, weights)
    model(ids, labels).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    for foreign, gradient in family.foreign(found, family.ours).items():  # type: ignore[arg-type]
        expected = exact.get_parameter(foreign).grad
        error = (gradient.double() - expected).norm() / expected.norm()
        assert error < 1e-4, (foreign, error.item())


# family -> choices of which each must move its logits
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("llama31", {"rotary_scaling": None}),
    ("llama31", {"rotary_scaling": {"kind": "linear", "factor": 4.0}}),
    ("llama31", {"rope_theta": 10000.0}),
    ("llama31", {"rotary_interleaved": True}),
    ("llama_linear", {"rotary_scaling": {"kind": "linear", "factor": 2.0}}),
    ("llama_yarn", {"rotary_scaling": None}),
    ("llama_yarn", {"rotary_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    (
        "llama_yarn",
        {
            "rotary_scaling": {
                "kind": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.0,
            }
        },
    ),
    ("mistral", {"layer_pattern": [{}]}),
    ("mistral", {"layer_pattern": [{"window": 6}]}),
    ("mistral", {"layer_pattern": [{"window": 8}]}),
    ("olmo2", {"norm_placement": "before"}),
    ("olmo3", {"layer_pattern": [{}, {"window": 9, "rotary": "unscaled"}]}),
    ("olmo3", {"layer_pattern": [{"window": 9}, {}]}),
    ("olmo3", {"layer_pattern": [{"window": 9, "rotary": "unscaled"}]}),
    ("smollm3", {"layer_pattern": [{}]}),
    ("smollm3", {"layer_pattern": [{"rotary": "none"}, {}]}),
    ("olmoe", {"experts": {"count": 6, "top_k": 2, "intermediate_size": 32, "renormalize": True}}),
    ("olmoe", {"experts": {"count": 6, "top_k": 3, "intermediate_size": 32}}),
    ("olmoe", {"experts": {"count": 6, "top_k": 2, "intermediate_size": 32, "scores": "sigmoid"}}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"attention_multiplier": 0.25}),
    ("granite", {"embedding_scale": 1.0}),
    ("granite", {"logits_scale": 1.0}),
    ("pythia", {"residual": "sequential"}),
    ("pythia", {"rotary_dim": 8}),
    ("neox_sequential", {"residual": "parallel"}),
    ("qwen3", {"norm_weight_offset": 1}),
    ("qwen3", {"logits_softcap": 5.0}),
    ("qwen3", {"attention_scale": "inverse_head_dim"}),
    ("qwen3", {"rotary_dim": 16}),
]


@pytest.mark.parametrize(("name", "change"), WRONG, ids=[f"{name}-{'-'.join(change)}" for name, change in WRONG])
def test_each_wrong_choice_moves_the_logits(name: str, change: dict[str, Any]) -> None:
    right = FAMILIES[name].ours
    tree = right.model_dump() | change
    if tree.get("rotary_scaling") is None:
        tree.pop("rotary_scaling", None)
    if set(change) == {"layer_pattern"} and all(kind.get("rotary") == "unscaled" for kind in change["layer_pattern"]):
        tree.pop("rotary_scaling")
    weights, ids = large_weights(right), tokens(right, 2, 33)
    wrong = logits_of(ModelConfig.model_validate(tree), weights, ids)
    assert (wrong - logits_of(right, weights, ids)).abs().max() > 0.05


def swapped(weights: dict[str, Tensor], first: str, second: str) -> dict[str, Tensor]:
    names = {name: name.replace(first, second) if first in name else name.replace(second, first) for name in weights}
    return {names[name]: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("qwen3", ".q_norm.", ".k_norm."), ("llama31", ".k_proj.", ".v_proj."), ("olmo2", "attention_norm", "ffn_norm")],
)
def test_swapped_weights_move_the_logits(name: str, first: str, second: str) -> None:
    family = FAMILIES[name]
    weights, ids = large_weights(family.ours), tokens(family.ours, 2, 33)
    wrong = logits_of(family.ours, swapped(weights, first, second), ids)
    assert (wrong - logits_of(family.ours, weights, ids)).abs().max() > 0.05


def test_a_norm_weight_offset_of_one_is_that_norm_with_weights_less_one() -> None:
    right = FAMILIES["qwen3"].ours
    offset = ModelConfig.model_validate(right.model_dump() | {"norm_weight_offset": 1})
    weights, ids = large_weights(right), tokens(right, 2, 33)
    less = {name: tensor - 1 if "norm" in name else tensor for name, tensor in weights.items()}
    shifted = {name: tensor + 1 if "norm" in name else tensor for name, tensor in less.items()}
    assert torch.equal(logits_of(offset, less, ids), logits_of(right, shifted, ids))
