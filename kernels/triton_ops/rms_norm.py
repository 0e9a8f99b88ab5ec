"""rms_norm: one program a row forward; backward in a fixed number of programs (`_norm_rows.py`)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.arguments import check_rms_norm
from weftrain.kernels.derivatives import first_derivatives_only
from weftrain.kernels.triton_ops import _norm_rows
from weftrain.kernels.triton_ops._launch import implementation, operator, rows_of
from weftrain.kernels.triton_ops._norm_rows import PROGRAMS, row_launch


@triton.jit
def _forward(x, weight, y, rstd, row_stride, n, eps, BLOCK: tl.constexpr):
    """One row: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps); all in fp32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    x_row = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x_row * x_row, 0) / n + eps))
    tl.store(rstd + row, r)
    tl.store(y + row * n + column, (x_row * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, x, weight, rstd, dx, dweight_partial, dy_row_stride, x_row_stride, rows, n,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program, program + PROGRAMS, ...: dx = rstd * (g - xhat * mean(g xhat)) with g = dy weight, xhat = x
    rstd.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(tl.cdiv(rows, PROGRAMS)):
        row = program + step * PROGRAMS
        here = inside & (row < rows)
        x_row = tl.load(x + row * x_row_stride + column, mask=here, other=0.0).to(tl.float32)
        dy_row = tl.load(dy + row * dy_row_stride + column, mask=here, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        xhat = x_row * r
        g = dy_row * w
        dx_row = r * (g - xhat * (tl.sum(g * xhat, 0) / n))
        tl.store(dx + row * n + column, dx_row.to(dx.dtype.element_ty), mask=here)
        dw += dy_row * xhat
    tl.store(dweight_partial + program * n + column, dw, mask=inside)


def _launch_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, n = x.shape
    y, rstd = _fake_forward(x, weight, eps)
    if rows:
        _forward[(rows,)](x, weight, y, rstd, x.stride(0), n, eps, **row_launch(n))
    return y, rstd


def _fake_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(
        x.shape[0], dtype=torch.float32, device=x.device
    )


def _launch_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    rows, n = x.shape
    dx = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    programs = min(rows, PROGRAMS)  # of few rows, each has a program of its own
    partial = torch.empty((programs, n), dtype=torch.float32, device=x.device)
    if rows:
        _backward[(programs,)](
            dy, x, weight, rstd, dx, partial, dy.stride(0), x.stride(0), rows, n, PROGRAMS=PROGRAMS, **row_launch(n)
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


_FORWARD = operator(
    "rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _launch_forward, _fake_forward
)
_BACKWARD = operator(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _FORWARD(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @first_derivatives_only("rms_norm", "triton")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = _BACKWARD(rows_of(dy), x, weight, rstd)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """As kernels/reference.py; fp32 throughout, rounded once. Deterministic.

    Saves x and weight as they are, and 1 / rms in fp32, [rows].
    """
    check_rms_norm(x, weight)
    return _RMSNorm.apply(rows_of(x), weight.contiguous(), eps).view(x.shape)


IMPLEMENTATION = implementation(
    "rms_norm", rms_norm, lambda: _norm_rows.compilations(_forward, _backward), _norm_rows.needs
)
