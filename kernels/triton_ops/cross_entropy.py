"""cross_entropy: one program a row, one pass over its vocabulary forward and one backward; no [N, V] probabilities are
saved.

The maximum and the sum are saved apart, not as one logsumexp. Of logits near 1000 a logsumexp has lost four digits that
the gradient needs. An ignored row gives loss 0 and gradient 0, and as in the reference a gradient of NaN where it holds
a NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.arguments import check_cross_entropy
from weftrain.kernels.contract import Compilation
from weftrain.kernels.derivatives import first_derivatives_only
from weftrain.kernels.triton_ops._launch import compilation, implementation, operator, rows_of
from weftrain.kernels.triton_ops._softmax_rows import (
    LOSS_TYPES,
    LOSSES,
    block_gradient,
    load_logits,
    row_block,
    row_factors,
    row_loss,
    row_statistics,
    smoothing_arguments,
)


@triton.jit
def _forward(
    logits, labels, token_weights, loss, maximum, total, row_stride, columns, scale, cap, z_loss, smoothing,
    uniform, ignore_index,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and the two numbers that the softmax is made of. None for what there is not."""
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * row_stride
    row_maximum, row_total, below = row_statistics(x, columns, scale, cap, smoothing, CAPPED, BLOCK)
    weight = tl.load(token_weights + row) if token_weights is not None else None
    row_label = tl.load(labels + row)
    tl.store(maximum + row, row_maximum)
    tl.store(total + row, row_total)
    loss_here = row_loss(
        x, row_label, weight, columns, scale, cap, z_loss, smoothing, uniform, ignore_index, row_maximum, row_total,
        below, CAPPED,
    )  # fmt: skip
    tl.store(loss + row, loss_here)


@triton.jit
def _backward(
    dloss, logits, labels, token_weights, maximum, total, dlogits, row_stride, columns, scale, cap, z_loss, smoothing,
    uniform, ignore_index,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: dlogits = dloss weight scale (softmax (1 + 2 z_loss logsumexp) - target) (1 - tanh^2) in fp32, rounded
    once; target: the onehot, or smoothed.
    """
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * row_stride
    dx = dlogits + row * columns
    label = tl.load(labels + row)
    m = tl.load(maximum + row)
    row_total = tl.load(total + row)
    incoming = tl.load(dloss + row)
    if token_weights is not None:
        incoming = incoming * tl.load(token_weights + row)
    softmax_factor, label_factor, z_factor = row_factors(
        label, columns, scale, z_loss, ignore_index, m, row_total, incoming
    )  # fmt: skip
    uniform_factor = None
    if smoothing is not None:
        uniform_factor = label_factor * uniform
        label_factor = label_factor * (1.0 - smoothing)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        values = load_logits(x, column, inside, scale, cap, CAPPED)
        gradient = block_gradient(
            values, column, label, cap, m, softmax_factor, label_factor, z_factor, uniform_factor, CAPPED
        )
        tl.store(dx + column, gradient.to(dlogits.dtype.element_ty), mask=inside)


def _launch_forward(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    logits_scale: float,
    ignore_index: int,
    z_loss: float,
    logits_softcap: float | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = logits.shape
    loss, maximum, total = _fake_forward(logits)
    if rows:
        block, warps = row_block(columns, logits_softcap is not None)
        _forward[(rows,)](
            logits, labels, token_weights, loss, maximum, total, logits.stride(0), columns, logits_scale,
            logits_softcap or 1.0, z_loss, *smoothing_arguments(label_smoothing, columns), ignore_index,
            CAPPED=logits_softcap is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss, maximum, total


def _fake_forward(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, maximum, total = (torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(3))
    return loss, maximum, total


def _launch_backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    logits_scale: float,
    ignore_index: int,
    z_loss: float,
    logits_softcap: float | None,
    label_smoothing: float,
) -> Tensor:
    rows, columns = logits.shape
    dlogits = _fake_backward(dloss, logits)
    if rows:
        block, warps = row_block(columns, logits_softcap is not None)
        _backward[(rows,)](
            dloss, logits, labels, token_weights, maximum, total, dlogits, logits.stride(0), columns, logits_scale,
            logits_softcap or 1.0, z_loss, *smoothing_arguments(label_smoothing, columns), ignore_index,
            CAPPED=logits_softcap is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dlogits


def _fake_backward(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


_FORWARD = operator(
    "cross_entropy_forward(Tensor logits, Tensor labels, Tensor? token_weights, float logits_scale, int ignore_index, "
    "float z_loss, float? logits_softcap, float label_smoothing) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_BACKWARD = operator(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor? token_weights, Tensor maximum, "
    "Tensor total, float logits_scale, int ignore_index, float z_loss, float? logits_softcap, float label_smoothing) "
    "-> Tensor",
    _launch_backward,
    _fake_backward,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, token_weights: Tensor | None, *statics: Any) -> Tensor:
        """statics: logits_scale, ignore_index, z_loss, logits_softcap, label_smoothing."""
        loss, maximum, total = _FORWARD(logits, labels, token_weights, *statics)
        ctx.save_for_backward(logits, labels, token_weights, maximum, total)
        ctx.statics = statics
        return loss

    @staticmethod
    @first_derivatives_only("cross_entropy", "triton")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _BACKWARD(dloss.contiguous(), *ctx.saved_tensors, *ctx.statics), *(None,) * 7


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    logits_scale: float = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    logits_softcap: float | None = None,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
) -> Tensor:
    """logits [N, V], labels int64 [N] -> token losses fp32 [N], 0 where ignored (kernels/reference.py). fp32 inside.

    A label outside 0..V-1 that is not ignored gives a loss of NaN, a gradient of 0, and no access out of bounds. Saves
    logits and labels as they are, and each row's maximum and sum of exponentials in fp32. Raises KernelError
    (kernels/arguments.py).
    """
    check_cross_entropy(logits, labels, ignore_index, logits_softcap, label_smoothing, token_weights)
    weights = None if token_weights is None else token_weights.contiguous()
    statics = (float(logits_scale), ignore_index, float(z_loss), logits_softcap, float(label_smoothing))
    return _CrossEntropy.apply(rows_of(logits), labels.contiguous(), weights, *statics)


def _compilations() -> list[Compilation]:
    found = []
    for dtype, width, size, capped, absent in LOSSES:
        block, warps = row_block(32000, capped)
        types = dict.fromkeys(("logits", "dlogits"), f"*{dtype}:16")
        types |= dict.fromkeys(("loss", "dloss", "maximum", "total"), "*fp32:16") | LOSS_TYPES
        types |= dict.fromkeys(("row_stride", "columns"), size)
        found += [
            compilation(f"{name} {dtype} {width}", kernel, types, {"CAPPED": capped, "BLOCK": block, **absent}, warps)
            for name, kernel in (("forward", _forward), ("backward", _backward))
        ]
    return found


IMPLEMENTATION = implementation("cross_entropy", cross_entropy, _compilations)
