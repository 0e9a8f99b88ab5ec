"""CrystalCoder as released, in plain torch on a dictionary of released tensors: what core/model.py is compared with.

Written from the model's published description and sharing nothing with the product: one function, weights in Hugging
Face's Conv1D layout ([in, out]; q, k and v side by side in c_attn), GPT-J style rotation with doubled tables. It
computes in the weights' dtype, so in float64 it also serves as the exact reference for gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def crystalcoder_logits(tensors: Mapping[str, Tensor], ids: Tensor, hyper: Mapping[str, Any]) -> Tensor:
    """ids [batch, length] -> logits [batch, length, vocabulary]; hyper: the keys of the released config.json."""
    table = tensors["transformer.wte.weight"]
    batch, length = ids.shape
    n_head = hyper["n_head"]
    width = hyper["n_embd"] // n_head
    rotary = hyper["rotary_dim"]
    scale = 1 / width if hyper["mup_scale_qk_dot_by_d"] else width**-0.5

    inv_freq = 1.0 / 10000 ** (torch.arange(0, rotary, 2).float() / rotary)
    angles = torch.arange(length).float()[:, None] * inv_freq[None, :]
    angles = angles.double() if table.dtype == torch.float64 else angles
    sin = angles.sin().to(table.dtype).repeat_interleave(2, dim=1)  # s0 s0 s1 s1 ...
    cos = angles.cos().to(table.dtype).repeat_interleave(2, dim=1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def normalise(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(
            x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], hyper["layer_norm_epsilon"]
        )

    def conv1d(x: Tensor, name: str) -> Tensor:
        # x @ [in, out] + bias, on a copy laid out [out, in]: for a few rows BLAS would otherwise add in another order
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"].T.contiguous(), tensors[f"{name}.bias"])

    def split_heads(x: Tensor) -> Tensor:
        return x.reshape(batch, length, n_head, width).permute(0, 2, 1, 3)

    def rotate(x: Tensor) -> Tensor:
        turned, kept = x[..., :rotary], x[..., rotary:]
        quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).reshape(turned.shape)
        return torch.cat((turned * cos + quarter * sin, kept), dim=-1)

    x = torch.nn.functional.embedding(ids, table) * hyper["mup_embeddings_scale"]
    for layer in range(hyper["n_layer"]):
        here = f"transformer.h.{layer}"
        query, key, value = conv1d(normalise(x, f"{here}.ln_1"), f"{here}.attn.c_attn").split(hyper["n_embd"], dim=2)
        scores = rotate(split_heads(query)) @ rotate(split_heads(key)).transpose(-1, -2) * scale
        scores = torch.where(future, torch.finfo(scores.dtype).min, scores)
        attended = torch.nn.functional.softmax(scores, dim=-1) @ split_heads(value)
        x = conv1d(attended.permute(0, 2, 1, 3).reshape(batch, length, -1), f"{here}.attn.c_proj") + x
        h = normalise(x, f"{here}.ln_2")
        x = x + conv1d(
            conv1d(h, f"{here}.mlp.c_fc") * torch.nn.functional.silu(conv1d(h, f"{here}.mlp.c_fc2")),
            f"{here}.mlp.c_proj",
        )
    return torch.nn.functional.linear(normalise(x, "transformer.ln_f"), table) * (
        hyper["mup_output_alpha"] * hyper["mup_width_scale"]
    )
