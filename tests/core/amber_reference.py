"""Amber (Llama) in plain torch, computing wholly in the weights' dtype: the float64 reference for gradients.

Hugging Face's Llama cannot serve: it reduces norms and softmax in fp32 even in a float64 model. Tensors bear Hugging
Face's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def amber_logits(tensors: Mapping[str, Tensor], ids: Tensor, hyper: Mapping[str, Any]) -> Tensor:
    """ids [batch, length] -> logits [batch, length, vocabulary]; hyper: the keys of a Llama config.json."""
    (batch, length), heads = ids.shape, hyper["num_attention_heads"]
    dtype = tensors["model.norm.weight"].dtype
    width = hyper["hidden_size"] // heads
    angles = torch.arange(length).float()[:, None] / hyper["rope_theta"] ** (
        torch.arange(0, width, 2).float() / width
    )  # fp32 by definition
    turn = torch.polar(torch.ones((), dtype=dtype), angles.to(dtype))  # complex [length, width / 2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def normalise(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + hyper["rms_norm_eps"]).sqrt() * tensors[f"{name}.weight"]

    def project(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T

    def split_heads(x: Tensor) -> Tensor:
        return x.view(batch, length, heads, width).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : width // 2].contiguous(), x[..., width // 2 :].contiguous()) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = tensors["model.embed_tokens.weight"][ids]
    for layer in range(hyper["num_hidden_layers"]):
        here = f"model.layers.{layer}"
        h = normalise(x, f"{here}.input_layernorm")
        q, k, v = (split_heads(project(h, f"{here}.self_attn.{which}_proj")) for which in "qkv")
        scores = (rotate(q) @ rotate(k).transpose(2, 3) / width**0.5).masked_fill(future, float("-inf"))
        x = x + project((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1), f"{here}.self_attn.o_proj")
        h = normalise(x, f"{here}.post_attention_layernorm")
        gate = project(h, f"{here}.mlp.gate_proj")
        x = x + project(gate * gate.sigmoid() * project(h, f"{here}.mlp.up_proj"), f"{here}.mlp.down_proj")
    return project(normalise(x, "model.norm"), "lm_head")
