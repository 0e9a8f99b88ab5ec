"""What the backward of each op must cost at least: bytes and flops, beside the forward's in kernels/ops.py.

What a reader would get wrong: a lower bound, counted as the forward is: what the formula needs is read once, each
gradient is written once, a multiply-add is two flops. Statistics (one fp32 a row) are left out. A kernel that
recomputes more does more, and its share of the roofline falls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Arguments = Mapping[str, Any]


def backward_costs(op: str, arguments: Arguments) -> tuple[int, int]:
    """(bytes, flops) of the backward of one call alone. Raises KeyError for an op without gradients."""
    return _COSTS[op](arguments)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rms_norm(arguments: Arguments) -> tuple[int, int]:
    """x, dy, weight -> dx, dweight. An element: x r, dy w, their product summed (2), dx = r (dy w - x r c) (3), dweight
    (2).
    """
    x, weight = arguments["x"], arguments["weight"]
    return 3 * _size(x) + 2 * _size(weight), 9 * x.numel()


def _layer_norm(arguments: Arguments) -> tuple[int, int]:
    """x, dy, weight -> dx, dweight, dbias. An element: (x - mean) r (2), dy w, two sums (3), dx (4), dweight (2), dbias
    (1).
    """
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    return 3 * _size(x) + 2 * _size(weight) + _size(bias), 13 * x.numel()


def _rope(arguments: Arguments) -> tuple[int, int]:
    """dy -> dx, turned by the negative angle: what the forward costs. An element that turns: two products and a sum."""
    x = arguments["x"]
    return 2 * _size(x) + _size(arguments["cos"]) + _size(arguments["sin"]), 3 * x[
        ..., : arguments["rotary_dim"]
    ].numel()


def _swiglu(arguments: Arguments) -> tuple[int, int]:
    """gate, up, dy -> dgate, dup. An element: sigmoid (3), silu, dup = dy silu, dgate = dy up s (1 + gate (1 - s))
    (6).
    """
    return 5 * _size(arguments["gate"]), 11 * arguments["gate"].numel()


def _attention(arguments: Arguments) -> tuple[int, int]:
    """q, k, v, out, dout -> dq, dk, dv: five products where the forward has two (Dao, arXiv 2307.08691, section
    3.1).
    """
    batch, tokens, heads, head_dim = arguments["q"].shape
    visible_pairs = tokens * (tokens + 1) // 2
    return 8 * _size(arguments["q"]), 10 * batch * heads * visible_pairs * head_dim


def _cross_entropy(arguments: Arguments) -> tuple[int, int]:
    """logits, labels, dloss fp32 -> dlogits. A logit: scale, minus logsumexp, exp, times dloss scale."""
    logits, labels = arguments["logits"], arguments["labels"]
    return 2 * _size(logits) + _size(labels) + 4 * labels.numel(), 4 * logits.numel()


def _linear_cross_entropy(arguments: Arguments) -> tuple[int, int]:
    """hidden, weight, labels -> dhidden, dweight: two products of the forward's size, and a logit's four; logits taken
    as kept on chip.
    """
    hidden, weight, labels = arguments["hidden"], arguments["weight"], arguments["labels"]
    pairs = hidden.shape[0] * weight.shape[0]
    return 2 * (_size(hidden) + _size(weight)) + _size(labels), pairs * (4 * hidden.shape[1] + 4)


_COSTS = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "attention": _attention,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}
