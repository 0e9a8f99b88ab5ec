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
from weftrain.kernels.contract import Compilation, KernelError
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
)

_NOT_YET = "label smoothing and token weights are not written yet"


@triton.jit
def _forward(
    logits, labels, loss, maximum, total, row_stride, columns, scale, cap, z_loss, ignore_index,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and the two numbers that the softmax is made of."""
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * row_stride
    row_maximum, row_total = row_statistics(x, columns, scale, cap, CAPPED, BLOCK)
    row_label = tl.load(labels + row)
    tl.store(maximum + row, row_maximum)
    tl.store(total + row, row_total)
    loss_here = row_loss(x, row_label, columns, scale, cap, z_loss, ignore_index, row_maximum, row_total, CAPPED)
    tl.store(loss + row, loss_here)


@triton.jit
def _backward(
    dloss, logits, labels, maximum, total, dlogits, row_stride, columns, scale, cap, z_loss, ignore_index,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: dlogits = dloss scale (softmax (1 + 2 z_loss logsumexp) - onehot) (1 - tanh^2) in fp32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * row_stride
    dx = dlogits + row * columns
    label = tl.load(labels + row)
    m = tl.load(maximum + row)
    softmax_factor, label_factor, z_factor = row_factors(
        label, columns, scale, z_loss, ignore_index, m, tl.load(total + row), tl.load(dloss + row)
    )  # fmt: skip
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        values = load_logits(x, column, inside, scale, cap, CAPPED)
        gradient = block_gradient(values, column, label, cap, m, softmax_factor, label_factor, z_factor, CAPPED)
        tl.store(dx + column, gradient.to(dlogits.dtype.element_ty), mask=inside)


def _launch_forward(
    logits: Tensor,
    labels: Tensor,
    logits_scale: float,
    ignore_index: int,
    z_loss: float,
    logits_softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = logits.shape
    loss, maximum, total = _fake_forward(logits, labels, logits_scale, ignore_index, z_loss, logits_softcap)
    if rows:
        block, warps = row_block(columns, logits_softcap is not None)
        _forward[(rows,)](
            logits, labels, loss, maximum, total, logits.stride(0), columns, logits_scale, logits_softcap or 1.0,
            z_loss, ignore_index, CAPPED=logits_softcap is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss, maximum, total


def _fake_forward(
    logits: Tensor,
    labels: Tensor,
    logits_scale: float,
    ignore_index: int,
    z_loss: float,
    logits_softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, maximum, total = (torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(3))
    return loss, maximum, total


def _launch_backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    maximum: Tensor,
    total: Tensor,
    logits_scale: float,
    ignore_index: int,
    z_loss: float,
    logits_softcap: float | None,
) -> Tensor:
    rows, columns = logits.shape
    dlogits = _fake_backward(dloss, logits)
    if rows:
        block, warps = row_block(columns, logits_softcap is not None)
        _backward[(rows,)](
            dloss, logits, labels, maximum, total, dlogits, logits.stride(0), columns, logits_scale,
            logits_softcap or 1.0, z_loss, ignore_index,
            CAPPED=logits_softcap is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dlogits


def _fake_backward(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


_FORWARD = operator(
    "cross_entropy_forward(Tensor logits, Tensor labels, float logits_scale, int ignore_index, float z_loss, "
    "float? logits_softcap) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_BACKWARD = operator(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor maximum, Tensor total, "
    "float logits_scale, int ignore_index, float z_loss, float? logits_softcap) -> Tensor",
    _launch_backward,
    _fake_backward,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, *statics: Any) -> Tensor:
        """statics: logits_scale, ignore_index, z_loss, logits_softcap."""
        loss, maximum, total = _FORWARD(logits, labels, *statics)
        ctx.save_for_backward(logits, labels, maximum, total)
        ctx.statics = statics
        return loss

    @staticmethod
    @first_derivatives_only("cross_entropy", "triton")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _BACKWARD(dloss.contiguous(), *ctx.saved_tensors, *ctx.statics), None, None, None, None, None


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
    if label_smoothing or token_weights is not None:
        raise KernelError(_NOT_YET)
    return _CrossEntropy.apply(
        rows_of(logits), labels.contiguous(), float(logits_scale), ignore_index, float(z_loss), logits_softcap
    )


def _compilations() -> list[Compilation]:
    found = []
    for dtype, width, size, capped in LOSSES:
        block, warps = row_block(32000, capped)
        types = dict.fromkeys(("logits", "dlogits"), f"*{dtype}:16")
        types |= dict.fromkeys(("loss", "dloss", "maximum", "total"), "*fp32:16") | LOSS_TYPES
        types |= dict.fromkeys(("row_stride", "columns"), size)
        found += [
            compilation(f"{name} {dtype} {width}", kernel, types, {"CAPPED": capped, "BLOCK": block}, warps)
            for name, kernel in (("forward", _forward), ("backward", _backward))
        ]
    return found


IMPLEMENTATION = implementation(
    "cross_entropy",
    cross_entropy,
    _compilations,
    lambda spec: _NOT_YET if spec.attributes.get("label_smoothing") or spec.attributes.get("token_weights") else None,
)
