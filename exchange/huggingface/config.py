"""The config.json of a Hugging Face folder from and to a ModelConfig, for the model types `llama` (Amber) and
`crystalcoder`.

The two model types differ in what they carry: Llama's standard deviations stand in initializer_range, CrystalCoder's
in no key at all (CRYSTALCODER_BASE_STD).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from pydantic import ValidationError

from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_model import first_problem
from weftrain.core.model_config import Initialization, ModelConfig, Mup
from weftrain.core.mup import resolve_scales
from weftrain.exchange.layouts import Layout, check_fit

CRYSTALCODER_BASE_STD = 0.073  # from the released params files; Hugging Face's config does not hold it


def layout_of(config: ModelConfig) -> Layout:
    """The Hugging Face layout of a model of this kind."""
    return "llama" if config.norm == "rms_norm" else "crystalcoder"


def config_from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """A parsed config.json of model_type `llama` or `crystalcoder` as a ModelConfig.

    Raises RecipeError naming the key that is missing, or that asks for something this decoder does not do.
    """
    readers = {"llama": _from_llama, "crystalcoder": _from_crystalcoder}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in readers:
        raise RecipeError(f"config.json: model_type {model_type!r} is neither 'llama' nor 'crystalcoder'")
    _require(config, {"quantization_config": None})
    try:
        return readers[model_type](config)
    except ValidationError as error:  # of our own field, whose name says which of theirs it is
        raise RecipeError(f"config.json: {first_problem(error)}; is the file damaged?") from error


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The config.json keys that let Hugging Face code compute this model; `config_from_huggingface` reads them back.

    The layout follows from the norm. Standard deviations are carried for Llama alone, as initializer_range. Raises
    CheckpointError.
    """
    layout = layout_of(config)
    check_fit(config, layout)
    return _to_llama(config) if layout == "llama" else _to_crystalcoder(config)


def _get(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise RecipeError(f"config.json: key '{key}' is missing; is the file complete?")
    return config[key]


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = _get(config, key)
    if type(value) is not int or value <= 0:
        raise RecipeError(f"config.json: {key} is {repr(value)[:80]}, not a number of 1 or more; is the file damaged?")
    return value


def _number(config: Mapping[str, Any], key: str) -> float:
    value = _get(config, key)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise RecipeError(f"config.json: {key} is {repr(value)[:80]}, not a number above 0; is the file damaged?")
    return float(value)


def _require(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise RecipeError(f"config.json: {key} is {repr(config[key])[:80]}; this decoder does {value!r} only")


def _from_llama(config: Mapping[str, Any]) -> ModelConfig:
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    bias = config.get("attention_bias", False)
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if not isinstance(rope, Mapping):
        raise RecipeError("config.json: rope_parameters is not an object; is the file damaged?")
    _require(config, {"hidden_act": "silu", "rope_scaling": None})
    _require({"mlp_bias": config.get("mlp_bias", False)}, {"mlp_bias": bias})
    # null: what follows
    given = {key: config[key] for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None}
    _require(given, {"num_key_value_heads": heads, "head_dim": hidden // heads})
    _require(rope, {"rope_type": "default", "partial_rotary_factor": 1.0})
    std = config.get("initializer_range", 0.02)
    return ModelConfig(
        vocab_size=_get(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=_get(config, "num_hidden_layers"),
        num_heads=heads,
        intermediate_size=_get(config, "intermediate_size"),
        max_position_embeddings=_get(config, "max_position_embeddings"),
        norm="rms_norm",
        norm_eps=_get(config, "rms_norm_eps"),
        linear_bias=bias,
        rotary_dim=hidden // heads,
        rotary_interleaved=False,
        rope_theta=_get(rope, "rope_theta"),
        attention_scale="inverse_sqrt_head_dim",
        tie_embeddings=config.get("tie_word_embeddings", False),
        initialization=Initialization(distribution="normal", embedding_std=std, matrix_std=std, output_matrix_std=std),
    )


def _to_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.linear_bias,
        "mlp_bias": config.linear_bias,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": cast(Initialization, config.initialization).matrix_std,
    }


def _from_crystalcoder(config: Mapping[str, Any]) -> ModelConfig:
    """muP from a base_std that the file lacks: CRYSTALCODER_BASE_STD, which matters to a fresh start alone."""
    _require(config, {"activation_function": "swiglu", "position_embedding_type": "rotary", "scale_attn_weights": True})
    _require(config, {"tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": False})
    hidden = _positive(config, "n_embd")
    by_d = _get(config, "mup_scale_qk_dot_by_d")
    return ModelConfig(
        vocab_size=_get(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=_get(config, "n_layer"),
        num_heads=_get(config, "n_head"),
        intermediate_size=_get(config, "n_inner"),
        max_position_embeddings=_get(config, "n_positions"),
        norm="layer_norm",
        norm_eps=_get(config, "layer_norm_epsilon"),
        linear_bias=True,
        rotary_dim=_get(config, "rotary_dim"),
        rotary_interleaved=True,
        rope_theta=10000.0,
        attention_scale="inverse_head_dim" if by_d else "inverse_sqrt_head_dim",
        tie_embeddings=True,
        mup=Mup(
            base_hidden_size=_proxy_width(hidden, _number(config, "mup_width_scale")),
            distribution="truncated_normal",
            base_std=CRYSTALCODER_BASE_STD,
            embedding_scale=_get(config, "mup_embeddings_scale"),
            base_logits_scale=_get(config, "mup_output_alpha"),
        ),
    )


def _proxy_width(hidden: int, scale: float) -> int:
    """The muP proxy's width, hidden x scale: whole up to the rounding of `scale`, or the scales derived from it would
    be others.
    """
    width = hidden * scale
    if round(width) < 1 or not math.isclose(round(width), width, rel_tol=1e-6):
        raise RecipeError(
            f"config.json: n_embd {hidden} x mup_width_scale {scale} = {width:.6g} is not a whole number, as a muP "
            "proxy's width is: "
            "correct mup_width_scale, or fold the scales into the weights first"
        )
    return round(width)


def _to_crystalcoder(config: ModelConfig) -> dict[str, Any]:
    scales, mup = resolve_scales(config), config.mup
    return {
        "model_type": "crystalcoder",
        "architectures": ["CrystalCoderLMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "activation_function": "swiglu",
        "layer_norm_epsilon": config.norm_eps,
        "position_embedding_type": "rotary",
        "rotary_dim": config.rotary_dim,
        "mup_embeddings_scale": scales.embedding_scale,
        "mup_output_alpha": mup.base_logits_scale if mup else scales.logits_scale,
        "mup_width_scale": mup.base_hidden_size / config.hidden_size if mup else 1.0,
        "mup_scale_qk_dot_by_d": config.attention_scale == "inverse_head_dim",
        "tie_word_embeddings": True,
    }
