"""The model section: what follows from other keys, what a dump leaves out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from model_cases import amber, crystal

from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_yaml import validate
from weftrain.core.model_config import LATER_FIELDS, LayerKind, ModelConfig


def test_defaults_follow_from_other_keys() -> None:
    config = amber()
    assert (config.num_kv_heads, config.head_dim, config.qkv_bias) == (4, 16, False)
    assert crystal().qkv_bias
    assert config.kind_of(2) == LayerKind()
    assert amber(head_dim=32, num_kv_heads=2).head_dim == 32


def test_a_dump_of_an_earlier_model_has_the_keys_that_it_had() -> None:
    for config in (amber(), crystal()):
        assert not set(config.model_dump()) & set(LATER_FIELDS)
        assert list(config.model_dump(mode="json"))[-1] == "mup"
        assert config.later_fields() == []
        assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    # a value that is given and equal to what follows is not said either
    assert amber(num_kv_heads=4, head_dim=16).model_dump() == amber().model_dump()


@pytest.mark.parametrize(
    "given",
    [
        {"num_kv_heads": 2},
        {"head_dim": 32},
        {"qkv_bias": True},
        {"qk_norm": "per_head"},
        {"norm_placement": "after"},
        {"norm_weight_offset": 1},
        {"residual": "parallel"},
        {"feed_forward": "gelu"},
        {"rotary_scaling": {"kind": "linear", "factor": 2.0}},
        {"rotary_scaling": {"kind": "yarn", "factor": 2, "original_max_position_embeddings": 16}},
        {"layer_pattern": [{"window": 5}, {}, {"rotary": "none"}]},
        {"logits_softcap": 30.0},
        {"attention_multiplier": 0.1, "residual_multiplier": 0.22},
    ],
)
def test_a_dump_keeps_what_is_not_a_default(given: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(amber().model_dump() | given)
    assert config.later_fields() == list(given)
    assert set(config.model_dump()) - set(amber().model_dump()) == set(given)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert ModelConfig.model_validate(config.model_dump()) == config


YARN = {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 5}, "x.yaml: hidden_size 64 is not a multiple of num_heads 5: change one, or give head_dim"),
        ({"num_heads": 0}, "x.yaml: num_heads: input should be greater than 0, not 0"),
        ({"num_kv_heads": 3}, "x.yaml: num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 10}, "x.yaml: rotary_dim 16 must be even and at most the head dimension 10"),
        ({"layer_pattern": [{}, {}]}, "x.yaml: layer_pattern names 2 layers and num_layers 3 is not a multiple of it"),
        ({"layer_pattern": []}, "x.yaml: layer_pattern: "),
        (
            {"attention_multiplier": 0.1, "attention_scale": "inverse_head_dim"},
            "x.yaml: attention_multiplier 0.1 takes",
        ),
        ({"layer_pattern": [{"window": 0}]}, "x.yaml: layer_pattern.0.window: input should be greater than 0, not 0"),
        ({"layer_pattern": [{"windw": 3}]}, "did you mean 'layer_pattern.*.window'?"),
        ({"qk_norm": 64}, "x.yaml: qk_norm: input should be 'none', 'per_head' or 'full', not an integer (64)"),
        (
            {"rotary_scaling": {"kind": "yarn", "factor": 2.0}},
            "x.yaml: missing key 'rotary_scaling.original_max_position_embeddings' (integer",
        ),
        (
            {"rotary_scaling": YARN | {"beta_fast": 0.5}},
            "x.yaml: rotary_scaling: beta_fast 0.5 must be above beta_slow",
        ),
        ({"rotary_scaling": {"kind": "dynamic", "factor": 2.0}}, "'linear', 'llama3', 'yarn'"),
        ({"rotary_scaling": YARN, "layer_pattern": [{"rotary": "none"}]}, "no layer of layer_pattern has"),
        ({"residual": "parallel", "norm_placement": "after"}, "residual 'parallel' needs norm_placement 'before'"),
        ({"norm_weight_offset": 2}, "x.yaml: norm_weight_offset: input should be 0 or 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_in_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate(ModelConfig, amber().model_dump() | change, lambda location: "x.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "more)" not in str(caught.value)  # what follows from a wrong key is not counted as wrong
