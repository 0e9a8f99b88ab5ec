"""Rotary position embedding. The formula is `kernels/reference.py:rope`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op, Size
from weftrain.kernels.ops._changes import no_rows, on_meta, other_dtype, replaced, shorter, so_many_tokens
from weftrain.kernels.ops._parts import Draw, in_float32, moved, read_all, size_bytes


def example(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    *,
    interleaved: bool,
    own_positions: bool = False,
) -> Callable[[str, torch.dtype], Arguments]:
    """heads: of q and of k. own_positions: each row begins at another."""

    def build(device: str, dtype: torch.dtype) -> Arguments:
        frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
        position = torch.arange(tokens).float()
        if own_positions:
            position = position + 5 * torch.arange(batch)[:, None]
        angle = position[..., None] * frequency
        draw = Draw(device, dtype)
        return {
            "q": draw.normal(batch, tokens, heads[0], head_dim),
            "k": draw.normal(batch, tokens, heads[1], head_dim),
            "cos": angle.cos().to(device),
            "sin": angle.sin().to(device),
            "rotary_dim": rotary_dim,
            "interleaved": interleaved,
        }

    return build


def bytes_moved(arguments: Arguments) -> int:
    return read_all(arguments) + size_bytes([arguments["q"], arguments["k"]])


def flops(arguments: Arguments) -> int:
    """An element that turns: two products and a sum."""
    return 3 * sum(arguments[name][..., : arguments["rotary_dim"]].numel() for name in ("q", "k"))


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """The incoming gradients, turned by the negative angle: what the forward costs."""
    return bytes_moved(arguments), flops(arguments)


def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = rotary_dim // 2
    turned = []
    for x in (q, k):
        out = list(x.unbind(-1))
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            pair = torch.complex(x[..., a], x[..., b]) * torch.complex(cos[..., i], sin[..., i])[..., None]
            out[a], out[b] = pair.real, pair.imag
        turned.append(torch.stack(out, -1))
    return turned[0], turned[1]


OP = Op(
    reference.rope,
    exact,
    differentiable=("q", "k"),
    outputs=("q_turned", "k_turned"),
    examples={
        "odd": example(2, 13, (3, 3), 20, 12, interleaved=False),
        "odd_interleaved": example(2, 13, (6, 3), 20, 12, interleaved=True),
        "odd_whole_head": example(1, 7, (3, 1), 10, 10, interleaved=False),
        "odd_own_positions": example(3, 7, (4, 2), 20, 12, interleaved=False, own_positions=True),
        "odd_own_positions_interleaved": example(3, 5, (5, 1), 18, 18, interleaved=True, own_positions=True),
        "edge": example(1, 33, (2, 2), 64, 64, interleaved=False),
        "edge_interleaved": example(1, 9, (2, 2), 64, 16, interleaved=True),
        "edge_wide": example(2, 3, (7, 1), 192, 192, interleaved=False, own_positions=True),
        "amber_7b": example(1, 2048, (32, 32), 128, 128, interleaved=False),
        "crystalcoder_7b": example(1, 2048, (32, 32), 128, 32, interleaved=True),
        "amber_7b_16k": example(8, 2048, (32, 32), 128, 128, interleaved=False),
        "crystalcoder_7b_16k": example(8, 2048, (32, 32), 128, 32, interleaved=True),
    },
    bytes_moved=bytes_moved,
    flops=flops,
    backward_cost=backward_cost,
    attributes={"head_dim": 128, "rotary_dim": 128, "interleaved": False},
    attributes_of=lambda arguments: {
        "head_dim": arguments["q"].shape[-1],
        "rotary_dim": arguments["rotary_dim"],
        "interleaved": arguments["interleaved"],
    },
    wrong={
        "q of rank 3": replaced("q", lambda q: q[0]),
        "q of integers": replaced("q", torch.Tensor.int),
        "k of rank 3": replaced("k", lambda k: k[0]),
        "k of fewer tokens": replaced("k", lambda k: k[:, :-1]),
        "k of narrower heads": replaced("k", shorter),
        "k of another dtype": replaced("k", other_dtype),
        "rotary_dim odd": replaced("rotary_dim", lambda dim: dim - 1),
        "rotary_dim beyond the head": replaced("rotary_dim", lambda dim: dim + 100),
        "rotary_dim 0": replaced("rotary_dim", lambda dim: 0),
        "cos of too few tokens": replaced("cos", lambda cos: cos[:-1]),
        "cos of too few rows": replaced("cos", lambda cos: cos.expand(5, *cos.shape[-2:])),
        "cos of rows and sin of all": lambda a: {**a, "cos": a["cos"].expand(len(a["q"]), *a["cos"].shape[-2:])},
        "sin too narrow": replaced("sin", shorter),
        "sin on another device": replaced("sin", on_meta),
    },
    edges={
        "no tokens": so_many_tokens(0),
        "one token": so_many_tokens(1),
        "three tokens": so_many_tokens(3),
        "no batch": no_rows("q", "k"),
        "one pair turns": lambda a: {**a, "rotary_dim": 2, "cos": a["cos"][..., :1], "sin": a["sin"][..., :1]},
        "positions of one row": lambda a: {
            **a,
            "cos": a["cos"].expand(len(a["q"]), -1, -1),
            "sin": a["sin"].expand(len(a["q"]), -1, -1),
        },
    },
    sizes={
        "tokens": Size(lambda n: example(1, n, (2, 1), 16, 8, interleaved=False), (1_100,), (70_001,)),
        "heads": Size(lambda n: example(1, 3, (n, 1), 16, 16, interleaved=True), (131,)),
        "head_dim": Size(lambda n: example(1, 5, (2, 1), n, n // 2 * 2, interleaved=False), (320,)),
    },
    ranges={"values of 10000": moved("q", "k", times=1e4)},
    cost=Cost(
        example(2, 256, (8, 4), 64, 64, interleaved=False),
        kept_bytes=lambda arguments: 2 * in_float32(arguments, "cos", "sin"),
        peak_bytes=lambda arguments: 4 * in_float32(arguments, "q", "k"),
    ),
)
