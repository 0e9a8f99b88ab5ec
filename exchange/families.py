"""The model families of Hugging Face that convert, as data: how config.json says a model and how weights are called.

The next dense family is one entry of FAMILIES, with names of its own in NAMES if its tensors are called otherwise. What
a family cannot say is not written down: `Family.unmet` lets the family say a model, reads that back and compares.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.exchange.config_keys import (
    BIASES,
    EVERY_WINDOW,
    INITIALIZATION,
    LAST_WINDOWS,
    PARALLEL,
    UNROTATED_LAYERS,
    Part,
    heads,
    named,
    rope,
    rope_by_window,
)
from weftrain.exchange.crystalcoder_keys import CRYSTALCODER_KEYS
from weftrain.exchange.experts_keys import MIXTRAL_EXPERTS, OLMOE_EXPERTS, QWEN3_EXPERTS
from weftrain.exchange.family import EXPERT, Family, Names
from weftrain.exchange.known_keys import Keys

# Names of tensors

_SWIGLU = {"ffn.gate_proj": "mlp.gate_proj", "ffn.up_proj": "mlp.up_proj", "ffn.down_proj": "mlp.down_proj"}
_ATTENTION = {
    f"attention.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
}
_LLAMA_OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_LLAMA = Names(
    layers="model.layers",
    inner={
        "attention_norm": "input_layernorm",
        **_ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        **_SWIGLU,
    },
    outer=_LLAMA_OUTER,
    buffers=("self_attn.rotary_emb.inv_freq",),
)
_OLMO = Names(  # norms after their branches
    layers="model.layers",
    inner={
        "attention_norm": "post_attention_layernorm",
        **_ATTENTION,
        "ffn_norm": "post_feedforward_layernorm",
        **_SWIGLU,
    },
    outer=_LLAMA_OUTER,
    buffers=("self_attn.rotary_emb.inv_freq",),
)
_EXPERTS = {
    "ffn.router": "mlp.gate",
    **{f"ffn.experts.{name}": f"mlp.experts.{EXPERT}.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
_LLAMA_EXPERTS = replace(_LLAMA, inner={**_LLAMA.inner, **_EXPERTS})
_MIXTRAL = replace(
    _LLAMA,
    inner={
        **_LLAMA.inner,
        "ffn.router": "block_sparse_moe.gate",
        "ffn.experts.gate_proj": f"block_sparse_moe.experts.{EXPERT}.w1",
        "ffn.experts.up_proj": f"block_sparse_moe.experts.{EXPERT}.w3",
        "ffn.experts.down_proj": f"block_sparse_moe.experts.{EXPERT}.w2",
    },
)
_GPT_NEOX = Names(
    layers="gpt_neox.layers",
    inner={
        "attention_norm": "input_layernorm",
        "attention.q_proj": "attention.query_key_value",
        "attention.k_proj": "attention.query_key_value",
        "attention.v_proj": "attention.query_key_value",
        "attention.o_proj": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn.up_proj": "mlp.dense_h_to_4h",
        "ffn.down_proj": "mlp.dense_4h_to_h",
    },
    outer={"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
    buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    by_head=True,
)
_CRYSTALCODER = Names(  # Conv1D; c_fc is the *up* projection, c_fc2 the *gate*
    layers="transformer.h",
    inner={
        "attention_norm": "ln_1",
        "attention.q_proj": "attn.c_attn",
        "attention.k_proj": "attn.c_attn",
        "attention.v_proj": "attn.c_attn",
        "attention.o_proj": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn.gate_proj": "mlp.c_fc2",
        "ffn.up_proj": "mlp.c_fc",
        "ffn.down_proj": "mlp.c_proj",
    },
    outer={"embedding": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"},
    buffers=("attn.bias", "attn.masked_bias"),  # causal masks
    transposed=True,
)
# The Cerebras Model Zoo 1.9, which has no config.json: exchange/modelzoo. It registers its last norm in the decoder
# too, so its checkpoints hold it twice.
_CEREBRAS = Names(
    layers="model.transformer_decoder.layers",
    inner={
        "attention_norm": "norm1",
        "attention.q_proj": "self_attn.proj_q_dense_layer",
        "attention.k_proj": "self_attn.proj_k_dense_layer",
        "attention.v_proj": "self_attn.proj_v_dense_layer",
        "attention.o_proj": "self_attn.proj_output_dense_layer",
        "ffn_norm": "norm3",
        "ffn.gate_proj": "ffn.ffn.0.linear_layer_for_glu",
        "ffn.up_proj": "ffn.ffn.0.linear_layer",
        "ffn.down_proj": "ffn.ffn.1.linear_layer",
    },
    outer={
        "embedding": "model.embedding_layer.word_embeddings",
        "final_norm": "model.ln_f",
        "head": "model.lm_head",
    },
    copies={"final_norm": "model.transformer_decoder.norm"},
)


# Families

_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_FIXED: dict[str, Any] = {
    "norm": "rms_norm",
    "linear_bias": False,
    "rotary_interleaved": False,
    "attention_scale": "inverse_sqrt_head_dim",
}
_SHARED = named(
    vocab_size="vocab_size",
    num_layers="num_hidden_layers",
    intermediate_size="intermediate_size",
    max_position_embeddings="max_position_embeddings",
    tie_embeddings="tie_word_embeddings",
)
_RMS_NORM = named(norm_eps="rms_norm_eps")
_SILU = {"hidden_act": "silu"}
_COMMON = (_SHARED, _RMS_NORM, INITIALIZATION)


def _family(model_type: str, architecture: str, names: Names, *parts: Part, **rest: Any) -> Family:
    """A family with RMSNorm, SwiGLU and no biases but those of its parts."""
    return Family(
        model_type,
        architecture,
        names,
        fixed={**_FIXED, **rest.get("fixed", {})},
        constants={**_SILU, **rest.get("constants", {})},
        parts=(*_COMMON, *parts),
        defaults={**_DEFAULTS, **rest["defaults"]},
    )


_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_OLMO_DEFAULTS = {
    "vocab_size": 50304,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
_OLMO_FIXED = {"norm_placement": "after", "qk_norm": "full"}


def _read_multipliers(keys: Keys) -> dict[str, Any]:
    own = {name: keys.number(name) for name in ("attention_multiplier", "residual_multiplier")}
    return {
        **own,
        "embedding_scale": keys.number("embedding_multiplier"),
        "logits_scale": 1 / keys.number("logits_scaling"),
    }


def _write_multipliers(config: ModelConfig) -> dict[str, Any]:
    scales = resolve_scales(config)
    return {
        "attention_multiplier": config.attention_multiplier or config.head_dim**-0.5,
        "residual_multiplier": config.residual_multiplier,
        "embedding_multiplier": scales.embedding_scale,
        "logits_scaling": 1 / scales.logits_scale,
    }


# Granite's numbers: attention, branches and embedding are multiplied, logits divided.
MULTIPLIERS = Part(
    ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"),
    _read_multipliers,
    _write_multipliers,
)
_NO_BIAS = {"attention_bias": False}  # it would be on o too, whose bias here goes with those of the feed-forward

# In the order in which an export tries them.
_ENTRIES = (
    _family(
        "llama",
        "LlamaForCausalLM",
        _LLAMA,
        heads(multiple=True),
        rope(),
        BIASES,
        defaults={
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    Family(
        "crystalcoder",
        "CrystalCoderLMHeadModel",
        _CRYSTALCODER,
        fixed={"norm": "layer_norm", "linear_bias": True, "rotary_interleaved": True, "rope_theta": 10000.0},
        constants={"activation_function": "swiglu", "position_embedding_type": "rotary", "tie_word_embeddings": True},
        parts=(CRYSTALCODER_KEYS,),
        defaults={},
    ),
    _family(
        "mistral",
        "MistralForCausalLM",
        _LLAMA,
        heads(),
        rope(),
        EVERY_WINDOW,
        defaults={
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    _family(
        "qwen2",
        "Qwen2ForCausalLM",
        _LLAMA,
        heads(),
        rope(),
        LAST_WINDOWS,
        fixed={"qkv_bias": True},
        defaults=_QWEN,
    ),
    _family(
        "qwen3",
        "Qwen3ForCausalLM",
        _LLAMA,
        heads(head_dim_stands=True),
        rope(),
        LAST_WINDOWS,
        fixed={"qk_norm": "per_head"},
        constants=_NO_BIAS,
        defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
    ),
    _family(
        "olmo2",
        "Olmo2ForCausalLM",
        _OLMO,
        heads(),
        rope(),
        fixed=_OLMO_FIXED,
        constants=_NO_BIAS,
        defaults=_OLMO_DEFAULTS,
    ),
    _family(
        "olmo3",
        "Olmo3ForCausalLM",
        _OLMO,
        heads(),
        rope_by_window(500000.0),
        fixed=_OLMO_FIXED,
        constants=_NO_BIAS,
        defaults={**_OLMO_DEFAULTS, "sliding_window": 4096},
    ),
    _family(
        "smollm3",
        "SmolLM3ForCausalLM",
        _LLAMA,
        heads(),
        rope(2000000.0),
        BIASES,
        UNROTATED_LAYERS,
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layer_interval": 4,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    _family(
        "granite",
        "GraniteForCausalLM",
        _LLAMA,
        heads(free_head_dim=False),
        rope(),
        BIASES,
        MULTIPLIERS,
        defaults={
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
    ),
    _family(
        "mixtral",
        "MixtralForCausalLM",
        _MIXTRAL,
        heads(),
        rope(1000000.0),
        EVERY_WINDOW,
        MIXTRAL_EXPERTS,
        constants={"router_jitter_noise": 0.0},
        defaults={
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
    ),
    _family(
        "olmoe",
        "OlmoeForCausalLM",
        _LLAMA_EXPERTS,
        heads(free_head_dim=False),
        rope(),
        OLMOE_EXPERTS,
        fixed={"qk_norm": "full"},
        constants={**_NO_BIAS, "clip_qkv": None},
        defaults={
            **_OLMO_DEFAULTS,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
        },
    ),
    _family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _LLAMA_EXPERTS,
        heads(),
        rope(),
        QWEN3_EXPERTS,
        fixed={"qk_norm": "per_head"},
        constants={**_NO_BIAS, "decoder_sparse_step": 1},
        defaults={
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "moe_intermediate_size": 768,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
        },
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _GPT_NEOX,
        fixed={**_FIXED, "norm": "layer_norm", "linear_bias": True, "feed_forward": "gelu"},
        constants={"hidden_act": "gelu", "attention_bias": True},
        parts=(
            _SHARED,
            INITIALIZATION,
            named(norm_eps="layer_norm_eps"),
            heads(grouped=False, free_head_dim=False, multiple=True),
            rope(theta_key="rotary_emb_base", share_key="rotary_pct", share=0.25),
            PARALLEL,
        ),
        defaults={
            "vocab_size": 50432,
            "hidden_size": 6144,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "intermediate_size": 24576,
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ENTRIES}
NAMES: dict[str, Names] = {**{name: family.names for name, family in FAMILIES.items()}, "cerebras": _CEREBRAS}
