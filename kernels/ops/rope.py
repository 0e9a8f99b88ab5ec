"""Rotary position embedding. The formula is `kernels/reference.py:rope`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Op
from weftrain.kernels.ops._changes import no_rows, on_meta, replaced, shorter, so_many_tokens
from weftrain.kernels.ops._parts import Draw, read_all_write_like, size_bytes


def example(
    batch: int, tokens: int, heads: int, head_dim: int, rotary_dim: int, *, interleaved: bool
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
        angle = torch.outer(torch.arange(tokens).float(), frequency)
        return {
            "x": Draw(device, dtype).normal(batch, tokens, heads, head_dim),
            "cos": angle.cos().to(device),
            "sin": angle.sin().to(device),
            "rotary_dim": rotary_dim,
            "interleaved": interleaved,
        }

    return build


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """dy -> dx, turned by the negative angle: what the forward costs. An element that turns: two products and a sum."""
    x = arguments["x"]
    return 2 * size_bytes(x) + size_bytes(arguments["cos"]) + size_bytes(arguments["sin"]), 3 * x[
        ..., : arguments["rotary_dim"]
    ].numel()


def exact(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    half = rotary_dim // 2
    out = list(x.unbind(-1))
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = torch.complex(x[..., a], x[..., b]) * torch.complex(cos[:, i], sin[:, i])[:, None]
        out[a], out[b] = turned.real, turned.imag
    return torch.stack(out, -1)


OP = Op(
    reference.rope,
    exact,
    differentiable=("x",),
    examples={
        "odd": example(2, 13, 3, 20, 12, interleaved=False),
        "odd_interleaved": example(2, 13, 3, 20, 12, interleaved=True),
        "odd_whole_head": example(1, 7, 3, 10, 10, interleaved=False),
        "edge": example(1, 33, 2, 64, 64, interleaved=False),
        "edge_interleaved": example(1, 9, 2, 64, 16, interleaved=True),
        "amber_7b": example(1, 2048, 32, 128, 128, interleaved=False),
        "crystalcoder_7b": example(1, 2048, 32, 128, 32, interleaved=True),
    },
    bytes_moved=read_all_write_like("x"),
    flops=lambda arguments: 3 * arguments["x"][..., : arguments["rotary_dim"]].numel(),
    backward_cost=backward_cost,
    attributes={"head_dim": 128, "rotary_dim": 128, "interleaved": False},
    attributes_of=lambda arguments: {
        "head_dim": arguments["x"].shape[-1],
        "rotary_dim": arguments["rotary_dim"],
        "interleaved": arguments["interleaved"],
    },
    wrong={
        "x of rank 3": replaced("x", lambda x: x[0]),
        "x of integers": replaced("x", torch.Tensor.int),
        "rotary_dim odd": replaced("rotary_dim", lambda dim: dim - 1),
        "rotary_dim beyond the head": replaced("rotary_dim", lambda dim: dim + 100),
        "rotary_dim 0": replaced("rotary_dim", lambda dim: 0),
        "cos of too few tokens": replaced("cos", lambda cos: cos[:-1]),
        "sin too narrow": replaced("sin", shorter),
        "sin on another device": replaced("sin", on_meta),
    },
    edges={
        "no tokens": so_many_tokens(0),
        "one token": so_many_tokens(1),
        "three tokens": so_many_tokens(3),
        "no batch": no_rows("x"),
        "one pair turns": lambda a: {**a, "rotary_dim": 2, "cos": a["cos"][:, :1], "sin": a["sin"][:, :1]},
    },
)
