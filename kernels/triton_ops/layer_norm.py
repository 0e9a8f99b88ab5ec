"""layer_norm: one program a row forward; backward in a fixed number of programs, each with its own partial sums for
weight and bias.

The variance is of the centred row (two passes over registers, no E[x^2] - E[x]^2), and there are no atomics: partial
sums are [programs, n] and added by one more pass, so the bits do not depend on the order in which programs run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.arguments import check_layer_norm
from weftrain.kernels.contract import Compilation, Spec
from weftrain.kernels.derivatives import first_derivatives_only
from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, implementation, next_power_of_2, operator, rows_of

# of the backward: two waves on a large GPU; constant, so that the same rows meet in the same partial sum everywhere
_PROGRAMS = 256
_MAX_HIDDEN_SIZE = 8192  # one program holds a whole row in registers; 16384 spills
_MAX_ANY_HIDDEN_SIZE = 4096  # of sizes that are no multiple of 16: their addresses take registers too


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


def _num_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = x.shape
    y, mean, rstd = _fake_forward(x, weight, bias, eps)
    if rows:
        block = next_power_of_2(n)
        _forward[(rows,)](x, weight, bias, y, mean, rstd, x.stride(0), n, eps, BLOCK=block, num_warps=_num_warps(block))
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
    programs = min(rows, _PROGRAMS)  # of few rows, each has a program of its own
    partials = torch.empty((2, programs, n), dtype=torch.float32, device=x.device)
    if rows:
        block = next_power_of_2(n)
        _backward[(programs,)](
            dy, x, weight, mean, rstd, dx, partials[0], partials[1], dy.stride(0), x.stride(0), rows, n,
            PROGRAMS=_PROGRAMS, BLOCK=block, num_warps=_num_warps(block),
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
    """x [..., n], weight and bias [n] -> x.dtype [..., n] (kernels/reference.py). Statistics and affine map in fp32,
    rounded once.

    Saves x, weight and bias as they are, and mean and 1 / deviation in fp32, [rows] each. Deterministic. Raises
    KernelError.
    """
    check_layer_norm(x, weight, bias)
    return _LayerNorm.apply(rows_of(x), weight.contiguous(), bias.contiguous(), eps).view(x.shape)


def _needs(spec: Spec) -> str | None:
    n = int(spec.attributes["hidden_size"])
    if n <= _MAX_ANY_HIDDEN_SIZE or (n <= _MAX_HIDDEN_SIZE and n % 16 == 0):
        return None
    return f"needs hidden_size <= {_MAX_HIDDEN_SIZE}, and a multiple of 16 beyond {_MAX_ANY_HIDDEN_SIZE}; this is {n}"


def _compilations() -> list[Compilation]:
    found = []
    # CrystalCoder's; in fp32, which takes most registers: the largest of any size, where nothing is aligned, and the
    # largest offered
    shapes = [(dtype, 4096, "i32:16") for dtype in TRITON_DTYPES.values()]
    for dtype, n, size in (*shapes, ("fp32", _MAX_ANY_HIDDEN_SIZE - 1, "i32"), ("fp32", _MAX_HIDDEN_SIZE, "i32:16")):
        block = next_power_of_2(n)
        x, w, f32 = f"*{dtype}:16", "*fp32:16", "*fp32:16"
        forward = {
            "x": x,
            "weight": w,
            "bias": w,
            "y": x,
            "mean": f32,
            "rstd": f32,
            "row_stride": size,
            "n": size,
            "eps": "fp32",
        }
        backward = {
            "dy": x,
            "x": x,
            "weight": w,
            "mean": f32,
            "rstd": f32,
            "dx": x,
            "dweight_partial": f32,
            "dbias_partial": f32,
        }
        backward |= {"dy_row_stride": size, "x_row_stride": size, "rows": size, "n": size}
        for name, kernel, signature, constants in (
            ("forward", _forward, forward, {"BLOCK": block}),
            ("backward", _backward, backward, {"PROGRAMS": _PROGRAMS, "BLOCK": block}),
        ):
            found.append(
                Compilation(
                    f"{name} {dtype} n{n}", kernel, signature, constants, num_warps=_num_warps(block), num_stages=3
                )
            )
    return found


IMPLEMENTATION = implementation("layer_norm", layer_norm, _compilations, _needs)
