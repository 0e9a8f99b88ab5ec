"""layer_norm: one program a row forward; backward in a fixed number of programs (`_norm_rows.py`).

The variance is of the centred row: two passes over registers, no E[x^2] - E[x]^2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.arguments import check_layer_norm
from weftrain.kernels.derivatives import first_derivatives_only
from weftrain.kernels.triton_ops import _norm_rows
from weftrain.kernels.triton_ops._launch import implementation, operator, rows_of
from weftrain.kernels.triton_ops._norm_rows import PROGRAMS, row_launch


@triton.jit
def _forward(x, weight, bias, y, mean, rstd, row_stride, n, eps, BLOCK: tl.constexpr):
    """One row: y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(mean((x - mean)^2) + eps); all in fp32, rounded
    once.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    x_row = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    m = tl.sum(x_row, 0) / n
    centred = tl.where(inside, x_row - m, 0.0)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 0) / n + eps))
    tl.store(mean + row, m)
    tl.store(rstd + row, r)
    # only now: held through the sums, they would spill
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + column, (centred * r * w + b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, x, weight, mean, rstd, dx, dweight_partial, dbias_partial, dy_row_stride, x_row_stride, rows, n,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program, program + PROGRAMS, ...: dx = rstd * (g - mean(g) - xhat * mean(g xhat)), g = dy weight, xhat = (x
    - mean) rstd.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    db = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(tl.cdiv(rows, PROGRAMS)):
        row = program + step * PROGRAMS
        here = inside & (row < rows)
        x_row = tl.load(x + row * x_row_stride + column, mask=here, other=0.0).to(tl.float32)
        dy_row = tl.load(dy + row * dy_row_stride + column, mask=here, other=0.0).to(tl.float32)
        m = tl.load(mean + row, mask=row < rows, other=0.0)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        xhat = tl.where(here, x_row - m, 0.0) * r
        g = dy_row * w
        dx_row = r * (g - tl.sum(g, 0) / n - xhat * (tl.sum(g * xhat, 0) / n))
        tl.store(dx + row * n + column, dx_row.to(dx.dtype.element_ty), mask=here)
        dw += dy_row * xhat
        db += dy_row
    tl.store(dweight_partial + program * n + column, dw, mask=inside)
    tl.store(dbias_partial + program * n + column, db, mask=inside)


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = x.shape
    y, mean, rstd = _fake_forward(x, weight, bias, eps)
    if rows:
        _forward[(rows,)](x, weight, bias, y, mean, rstd, x.stride(0), n, eps, **row_launch(n))
    return y, mean, rstd


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    return y, mean, rstd


def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = x.shape
    dx = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    programs = min(rows, PROGRAMS)  # of few rows, each has a program of its own
    partials = torch.empty((2, programs, n), dtype=torch.float32, device=x.device)
    if rows:
        _backward[(programs,)](
            dy, x, weight, mean, rstd, dx, partials[0], partials[1], dy.stride(0), x.stride(0), rows, n,
            PROGRAMS=PROGRAMS, **row_launch(n),
        )  # fmt: skip
    return dx, partials[0].sum(0).to(weight.dtype), partials[1].sum(0).to(bias.dtype)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight), torch.empty_like(bias)


_FORWARD = operator(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_BACKWARD = operator(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) -> (Tensor, "
    "Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _FORWARD(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @first_derivatives_only("layer_norm", "triton")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = _BACKWARD(rows_of(dy), *ctx.saved_tensors)
        return dx, dweight, dbias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """As kernels/reference.py; statistics and affine map in fp32, rounded once. Deterministic.

    Saves x, weight and bias as they are, and mean and 1 / deviation in fp32, [rows] each.
    """
    check_layer_norm(x, weight, bias)
    return _LayerNorm.apply(rows_of(x), weight.contiguous(), bias.contiguous(), eps).view(x.shape)


IMPLEMENTATION = implementation(
    "layer_norm", layer_norm, lambda: _norm_rows.compilations(_forward, _backward), _norm_rows.needs
)
