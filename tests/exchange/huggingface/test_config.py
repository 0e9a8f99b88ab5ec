"""config.json in and out: the released configs are the shipped recipes, and what this decoder does not do is refused."""

from __future__ import annotations

import json

import pytest
from model_cases import amber, crystal
from places import SHARED

from weftrain.core.errors import RecipeError
from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.recipe_file import load_recipe
from weftrain.exchange.huggingface.config import config_from_huggingface, config_to_huggingface


def test_released_crystalcoder_config_is_the_recipe() -> None:
    path = SHARED / "data" / "crystalcoder" / "huggingface_config.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    assert config_from_huggingface(json.loads(path.read_text())) == load_recipe("crystalcoder_7b_phase1").recipe.model


@pytest.mark.parametrize("scale", [0.03, 0.0333, 0.001, 1.01])
def test_a_width_scale_without_a_proxy_is_refused(scale: float) -> None:
    """Rounded to a whole width, the logits scale of n_embd 96 and 0.03 was 0.069375 and not 0.0666."""
    written = config_to_huggingface(crystal())
    with pytest.raises(RecipeError, match=r"mup_width_scale .* is not a whole number"):
        config_from_huggingface({**written, "mup_width_scale": scale})


@pytest.mark.parametrize("scale", [1 / 3, 0.125, 1.0, 3.0, 1 / 96])
def test_the_logits_scale_is_what_the_config_says(scale: float) -> None:
    written = {**config_to_huggingface(crystal()), "n_embd": 96, "n_head": 3, "rotary_dim": 8, "mup_width_scale": scale}
    found = resolve_scales(config_from_huggingface(written)).logits_scale
    assert found == pytest.approx(written["mup_output_alpha"] * scale, rel=1e-12)


def test_amber_config_is_the_recipe() -> None:
    """The keys of LLM360/Amber's config.json that decide the function."""
    released = {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    assert config_from_huggingface(released) == load_recipe("amber_7b").recipe.model


@pytest.mark.parametrize(
    "config", [amber(), amber(rope_theta=500.0, linear_bias=True), crystal(), crystal(base_hidden_size=64)]
)
def test_config_round_trip(config: ModelConfig) -> None:
    assert config_from_huggingface(json.loads(json.dumps(config_to_huggingface(config)))) == config


def test_transformers_own_config_is_understood() -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.LlamaConfig(**config_to_huggingface(amber(rope_theta=500.0))).to_dict()
    assert config_from_huggingface(written) == amber(rope_theta=500.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_configs_beyond_this_decoder_are_refused(change: dict[str, object], reason: str) -> None:
    settings_ = {**config_to_huggingface(amber()), **change}
    with pytest.raises(RecipeError, match=reason):
        config_from_huggingface({key: value for key, value in settings_.items() if value is not ...})
