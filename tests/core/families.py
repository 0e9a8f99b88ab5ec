"""Small models of each open family: our config, the same model as `transformers` configures it, and its tensor names.

Written by hand and apart from weftrain.exchange, so that the two can be held against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from model_cases import amber
from torch import Tensor

from weftrain.core.model_config import ModelConfig

LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
GROUPED: dict[str, Any] = {"num_kv_heads": 2, "rope_theta": 500.0}


@dataclass(frozen=True)
class Family:
    """`theirs`: fields of the class `transformers` calls `name`Config, beyond those that every family shares."""

    name: str
    ours: ModelConfig
    theirs: Mapping[str, Any]
    foreign: Callable[[dict[str, Tensor], ModelConfig], dict[str, Tensor]]


_MODULES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "ffn": "mlp",
    "layers": "model.layers",
}


def llama_names(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """q_proj and its like are called alike; a norm after its branch has another name than one before it."""
    names = dict(_MODULES)
    if config.norm_placement == "after":
        names |= {"attention_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}
    return {".".join(names.get(part, part) for part in name.split(".")): weights[name] for name in weights}


def expert_names(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """As a model of `transformers` has them in memory: gate and up of all experts in one tensor."""
    found = {}
    for name, tensor in llama_names(weights, config).items():
        if ".experts.gate_proj." in name:
            up = weights[_ours(name).replace("gate_proj", "up_proj")]
            found[name.replace("gate_proj.weight", "gate_up_proj")] = torch.cat([tensor, up], 1)
        elif ".experts." in name and ".up_proj." not in name:
            found[name.removesuffix(".weight")] = tensor
        elif ".experts." not in name:
            found[name.replace(".router.", ".gate.")] = tensor
    return found


def _ours(name: str) -> str:
    return name.replace("model.layers", "layers").replace(".mlp.", ".ffn.")


def neox_names(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """q, k and v of each head lie in one matrix, head by head."""
    names = {
        "embedding": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "lm_head",
        "layers": "gpt_neox.layers",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "o_proj": "dense",
        "ffn": "mlp",
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    }
    found = {}
    for name in weights:
        if ".k_proj." in name or ".v_proj." in name:
            continue
        foreign = ".".join(names.get(part, part) for part in name.split("."))
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", one)] for one in ("q_proj", "k_proj", "v_proj")]
            by_head = [part.unflatten(0, (config.num_heads, config.head_dim)) for part in parts]
            found[foreign.replace("q_proj", "query_key_value")] = torch.cat(by_head, 1).flatten(0, 1)
        else:
            found[foreign] = weights[name]
    return found


def _layers(*kinds: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return kinds


FAMILIES = {
    "llama31": Family(
        "Llama",
        amber(**GROUPED, rotary_scaling={"kind": "llama3", **LLAMA3}),
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
        llama_names,
    ),
    "llama_multi_query": Family(
        "Llama",
        amber(num_kv_heads=1),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        llama_names,
    ),
    "llama_linear": Family(
        "Llama",
        amber(rotary_scaling={"kind": "linear", "factor": 3.0}),
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
        llama_names,
    ),
    "llama_yarn": Family(
        "Llama",
        amber(**GROUPED, rotary_scaling={"kind": "yarn", **YARN}),
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN}},
        llama_names,
    ),
    "mistral": Family(
        "Mistral",
        amber(**GROUPED, layer_pattern=_layers({"window": 7})),
        {"sliding_window": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        llama_names,
    ),
    "qwen2": Family(
        "Qwen2",
        amber(**GROUPED, qkv_bias=True, tie_embeddings=True),
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        llama_names,
    ),
    "qwen3": Family(
        "Qwen3",
        amber(**GROUPED, head_dim=32, rotary_dim=32, qk_norm="per_head"),
        {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        llama_names,
    ),
    "olmo2": Family(
        "Olmo2",
        amber(**GROUPED, qk_norm="full", norm_placement="after"),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        llama_names,
    ),
    "olmo3": Family(
        "Olmo3",
        amber(
            **GROUPED,
            num_layers=4,
            qk_norm="full",
            norm_placement="after",
            rotary_scaling={"kind": "yarn", **YARN},
            layer_pattern=_layers({"window": 9, "rotary": "unscaled"}, {}),
        ),
        {
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_type": "yarn", "rope_theta": 500.0, **YARN},
            },
        },
        llama_names,
    ),
    "smollm3": Family(
        "SmolLM3",
        amber(**GROUPED, num_layers=4, tie_embeddings=True, layer_pattern=_layers({}, {"rotary": "none"})),
        {
            "no_rope_layers": [1, 0, 1, 0],
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        llama_names,
    ),
    "granite": Family(
        "Granite",
        amber(
            **GROUPED,
            tie_embeddings=True,
            embedding_scale=12.0,
            logits_scale=1 / 16,
            attention_multiplier=0.15,
            residual_multiplier=0.22,
        ),
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "logits_scaling": 16.0,
            "attention_multiplier": 0.15,
            "residual_multiplier": 0.22,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        llama_names,
    ),
    # Experts of 32: rows of 16 numbers and more are aligned alike in both programs, and `transformers`, which multiplies
    # with gate and up in one product of 64, has the same sums. At other widths the matrix library cuts the two into
    # different blocks, and logits differ by 3e-7 of their size.
    "olmoe": Family(
        "Olmoe",
        amber(intermediate_size=32, qk_norm="full", experts={"count": 6, "top_k": 2, "intermediate_size": 32}),
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        expert_names,
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        amber(
            **GROUPED,
            head_dim=32,
            rotary_dim=32,
            qk_norm="per_head",
            experts={"count": 5, "top_k": 3, "intermediate_size": 32, "renormalize": True, "dense_layers": 1},
        ),
        {
            "head_dim": 32,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "router_aux_loss_coef": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        expert_names,
    ),
    "mixtral": Family(
        "Mixtral",
        amber(
            **GROUPED,
            intermediate_size=32,
            layer_pattern=_layers({"window": 7}),
            experts={"count": 4, "top_k": 2, "intermediate_size": 32, "renormalize": True},
        ),
        {
            "sliding_window": 7,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        expert_names,
    ),
    "pythia": Family(
        "GPTNeoX",
        amber(
            norm="layer_norm",
            norm_eps=1e-5,
            linear_bias=True,
            rotary_dim=4,
            residual="parallel",
            feed_forward="gelu",
        ),
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
        neox_names,
    ),
    "neox_sequential": Family(
        "GPTNeoX",
        amber(norm="layer_norm", norm_eps=1e-5, linear_bias=True, rotary_dim=16, feed_forward="gelu"),
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": False,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        neox_names,
    ),
}


def their_model(family: Family, weights: dict[str, Tensor]) -> Any:
    """The same model and weights in `transformers`, with its eager attention and experts. Every tensor must have found
    its place.
    """
    import transformers

    config = family.ours
    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        "pad_token_id": None,  # a padding token's embedding would get no gradient
    }
    if family.name == "GPTNeoX":
        del shared["num_key_value_heads"], shared["rms_norm_eps"]
    settings = getattr(transformers, f"{family.name}Config")(
        **shared | dict(family.theirs), attn_implementation="eager"
    )
    settings._experts_implementation = "eager"  # one expert after another; the default has no float64
    model = getattr(transformers, f"{family.name}ForCausalLM")(settings).eval()
    tensors = family.foreign(weights, config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set()), missing
    return model
