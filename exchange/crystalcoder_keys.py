"""CrystalCoder's config.json, whose keys are GPT-2's with muP's multipliers.

Its standard deviations stand in no key: muP is read with CRYSTALCODER_BASE_STD, which matters to a fresh start alone.
"""

from __future__ import annotations

import math
from typing import Any

from weftrain.core.errors import RecipeError
from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.exchange.config_keys import Part
from weftrain.exchange.known_keys import Keys

CRYSTALCODER_BASE_STD = 0.073  # from the released params files; Hugging Face's config does not hold it
_SAME = {
    "vocab_size": "vocab_size",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "rotary_dim": "rotary_dim",
}


def _read(keys: Keys) -> dict[str, Any]:
    keys.require("scale_attn_weights", True)
    keys.require("scale_attn_by_inverse_layer_idx", False)
    hidden = keys.count("n_embd")
    by_d = keys.get("mup_scale_qk_dot_by_d")
    return {name: keys.get(key) for name, key in _SAME.items()} | {
        "hidden_size": hidden,
        "attention_scale": "inverse_head_dim" if by_d else "inverse_sqrt_head_dim",
        "tie_embeddings": True,
        "mup": {
            "base_hidden_size": _proxy_width(hidden, keys.number("mup_width_scale")),
            "distribution": "truncated_normal",
            "base_std": CRYSTALCODER_BASE_STD,
            "embedding_scale": keys.get("mup_embeddings_scale"),
            "base_logits_scale": keys.get("mup_output_alpha"),
        },
    }


def _proxy_width(hidden: int, scale: float) -> int:
    """The muP proxy's width, hidden x scale: whole up to the rounding of `scale`, or the scales derived from it would
    be others.
    """
    width = hidden * scale
    if round(width) < 1 or not math.isclose(round(width), width, rel_tol=1e-6):
        raise RecipeError(
            f"config.json: n_embd {hidden} x mup_width_scale {scale} = {width:.6g} is not a whole number, as a muP "
            "proxy's width is: correct mup_width_scale, or fold the scales into the weights first"
        )
    return round(width)


def _write(config: ModelConfig) -> dict[str, Any]:
    scales, mup = resolve_scales(config), config.mup
    return {key: getattr(config, name) for name, key in _SAME.items()} | {
        "n_embd": config.hidden_size,
        "mup_embeddings_scale": scales.embedding_scale,
        "mup_output_alpha": mup.base_logits_scale if mup else scales.logits_scale,
        "mup_width_scale": mup.base_hidden_size / config.hidden_size if mup else 1.0,
        "mup_scale_qk_dot_by_d": config.attention_scale == "inverse_head_dim",
    }


CRYSTALCODER_KEYS = Part(
    (
        *_SAME.values(),
        "n_embd",
        "mup_embeddings_scale",
        "mup_output_alpha",
        "mup_width_scale",
        "mup_scale_qk_dot_by_d",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "auto_map",  # the model's own code, as transformers has none
    ),
    _read,
    _write,
)
