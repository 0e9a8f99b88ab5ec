"""Weights and configs between the canonical names of core/parameters.py and three foreign layouts: names in, names out, bits unchanged.

Layouts: `llama` (Hugging Face LlamaForCausalLM: Amber), `crystalcoder` (Hugging Face CrystalCoder) and `cerebras` (Model Zoo 1.9).
What a reader would get wrong: Hugging Face CrystalCoder's linear maps are Conv1D, stored [in, out], with q, k and v side by side in
one c_attn; `c_fc` is *up* and `c_fc2` is *gate*. Tensors stream one at a time: neither side is ever held whole by this module.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weftrain.core.config import Initialization, ModelConfig, Mup
from weftrain.core.errors import CheckpointError, RecipeError
from weftrain.core.parameters import Role, parameter_specs

Layout = Literal["llama", "crystalcoder", "cerebras"]

# Canonical module -> foreign module, within a layer and outside of one. A layout without an entry has no such module.
_LAYER: dict[str, dict[str, str]] = {
    "llama": {
        "attention_norm": "input_layernorm",
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.o_proj": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn.gate_proj": "mlp.gate_proj",
        "ffn.up_proj": "mlp.up_proj",
        "ffn.down_proj": "mlp.down_proj",
    },
    "crystalcoder": {
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
    "cerebras": {
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
}
_OUTSIDE: dict[str, dict[str, str]] = {
    "llama": {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
    "crystalcoder": {"embedding": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"},
    "cerebras": {
        "embedding": "model.embedding_layer.word_embeddings",
        "final_norm": "model.transformer_decoder.norm",
        "head": "model.lm_head",
    },
}
_LAYER_PREFIX = {"llama": "model.layers", "crystalcoder": "transformer.h", "cerebras": "model.transformer_decoder.layers"}
# Buffers, not weights: causal masks of CrystalCoder's attention, rotary frequencies of old Llama files.
_IGNORED = {"llama": ("self_attn.rotary_emb.inv_freq",), "crystalcoder": ("attn.bias", "attn.masked_bias"), "cerebras": ()}
