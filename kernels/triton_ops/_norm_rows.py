"""The four norms, which are one pair of kernels: with a mean (layer_norm) or without (rms_norm), of x or of the sum of
a residual and a branch.

A program holds a tile of whole rows in registers: one row of a hidden state, or as many heads as make a tile of the
same size. A longer row is gone through block by block, and what is needed twice is read again from the cache. The
backward runs in two programs for each multiprocessor (of long rows one), each with its own partial sums of the
parameters' gradients. There are no atomics: partial sums are [programs, n] and added by one more pass, so the bits of
the parameters' gradients do not depend on the order in which programs run. They do depend on the number of
multiprocessors, which a run's fingerprint records; on one kind of GPU they are the same each time. All other results do
not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.contract import Compilation, Implementation
from weftrain.kernels.derivatives import first_derivatives_only
from weftrain.kernels.triton_ops._launch import (
    TRITON_DTYPES,
    compilation,
    implementation,
    next_power_of_2,
    operator,
    rows_of,
)

PROGRAMS_PER_MULTIPROCESSOR = 2  # of the backward: as many as its registers let run at a time
INTERPRETED_PROGRAMS = 32  # on a CPU, which has no multiprocessors
_TILE_BYTES = 8192  # of a tile of several rows: as many bytes in flight as of a hidden state of 4096 in bf16
_MAX_ROWS = 64  # of a tile
# of a row in registers: 16384 spills; of a sum with a mean, in two dtypes, this does too
_MAX_TILE = 8192
_MAX_ANY_TILE = 4096  # of sizes that are no multiple of 16: their addresses take registers too
_LONG_FORWARD = {"BLOCK": 4096, "num_warps": 8}  # of longer rows
# Two rows of 16384 in bf16, twice read, and their partial sums are a multiprocessor's share of an H200's L2 cache.
_LONG_BACKWARD = {"ROWS": 2, "BLOCK": 2048, "num_warps": 8}
_LONG_ANY_BACKWARD = {"ROWS": 2, "BLOCK": 1024, "num_warps": 8}  # of sizes that are no multiple of 16


@triton.jit
def _forward(
    x, branch, weight, bias, total, y, mean, rstd, x_row_stride, branch_row_stride, rows, n, eps,
    CENTRED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile: y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(mean((x - mean)^2) + eps), in fp32, rounded once.

    Not CENTRED: the mean is 0, and there is no bias. ADD: x + branch, rounded to x's dtype, is what is normed, and
    stored. The variance is of the centred row: two passes over registers, no E[x^2] - E[x]^2.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    row_here, inside = row < rows, column < n
    here = row_here[:, None] & inside
    x_tile = tl.load(x + row[:, None] * x_row_stride + column, mask=here, other=0.0).to(tl.float32)
    if ADD:
        branch_tile = tl.load(branch + row[:, None] * branch_row_stride + column, mask=here, other=0.0)
        rounded = (x_tile + branch_tile.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row[:, None] * n + column, rounded, mask=here)
        x_tile = rounded.to(tl.float32)
    if CENTRED:
        m = tl.sum(x_tile, 1) / n
        tl.store(mean + row, m, mask=row_here)
        x_tile = tl.where(inside, x_tile - m[:, None], 0.0)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x_tile * x_tile, 1) / n + eps))
    tl.store(rstd + row, r, mask=row_here)
    # the parameters only now: held through the sums, they would spill
    y_tile = x_tile * r[:, None] * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        y_tile += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * n + column, y_tile.to(y.dtype.element_ty), mask=here)


@triton.jit
def _backward(
    dy, dtotal, x, weight, mean, rstd, dx, dbranch, dweight_partial, dbias_partial, dy_row_stride, dtotal_row_stride,
    x_row_stride, rows, n,
    CENTRED: tl.constexpr, ADD: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles program, program + programs, ...: dx = rstd * (g - mean(g) - xhat * mean(g xhat)), g = dy weight, xhat = (x
    - mean) rstd.

    Not CENTRED: without the two means. ADD: plus dtotal, the gradient of the sum; NARROW: also in the branch's dtype.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < n
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    db = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for step in range(tl.cdiv(rows, programs * ROWS)):
        row = (program + step * programs) * ROWS + tl.arange(0, ROWS)
        row_here = row < rows
        here = row_here[:, None] & inside
        xhat = tl.load(x + row[:, None] * x_row_stride + column, mask=here, other=0.0).to(tl.float32)
        dy_tile = tl.load(dy + row[:, None] * dy_row_stride + column, mask=here, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row_here, other=0.0)[:, None]
        if CENTRED:
            xhat = tl.where(here, xhat - tl.load(mean + row, mask=row_here, other=0.0)[:, None], 0.0)
        xhat *= r
        g = dy_tile * w
        centred = g
        if CENTRED:
            centred = g - (tl.sum(g, 1) / n)[:, None]
            db += dy_tile
        dx_tile = r * (centred - xhat * (tl.sum(g * xhat, 1) / n)[:, None])
        if ADD:
            dtotal_row = dtotal + row[:, None] * dtotal_row_stride
            dx_tile += tl.load(dtotal_row + column, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * n + column, dx_tile.to(dx.dtype.element_ty), mask=here)
        if NARROW:
            tl.store(dbranch + row[:, None] * n + column, dx_tile.to(dbranch.dtype.element_ty), mask=here)
        dw += dy_tile * xhat
    partial = program * n + column
    tl.store(dweight_partial + partial, tl.sum(dw, 0)[None, :], mask=inside)
    if CENTRED:
        tl.store(dbias_partial + partial, tl.sum(db, 0)[None, :], mask=inside)


@triton.jit
def _forward_long(
    x, branch, weight, bias, total, y, mean, rstd, x_row_stride, branch_row_stride, n, eps,
    CENTRED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, as _forward, block by block."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x + row * x_row_stride
    m = 0.0
    if ADD or CENTRED:
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = tl.load(x_row + column, mask=column < n, other=0.0).to(tl.float32)
            if ADD:
                values += tl.load(branch + row * branch_row_stride + column, mask=column < n, other=0.0).to(tl.float32)
                rounded = values.to(total.dtype.element_ty)
                tl.store(total + row * n + column, rounded, mask=column < n)
                values = rounded.to(tl.float32)
            sums += values
        if ADD:
            x_row = total + row * n
            tl.debug_barrier()  # every warp has stored its part of the sum before any reads it
        if CENTRED:
            m = tl.sum(sums, 0) / n
            tl.store(mean + row, m)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(x_row + column, mask=column < n, other=0.0).to(tl.float32)
        if CENTRED:
            values = tl.where(column < n, values - m, 0.0)
        squares += values * values
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) / n + eps))
    tl.store(rstd + row, r)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(x_row + column, mask=column < n, other=0.0).to(tl.float32)
        if CENTRED:
            values -= m
        values = values * r * tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)
        if CENTRED:
            values += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
        tl.store(y + row * n + column, values.to(y.dtype.element_ty), mask=column < n)


@triton.jit
def _backward_long(
    dy, dtotal, x, weight, mean, rstd, dx, dbranch, dweight_partial, dbias_partial, dy_row_stride, dtotal_row_stride,
    x_row_stride, rows, n,
    CENTRED: tl.constexpr, ADD: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows at a time, as _backward, block by block: their means first, then the gradients.

    The program's partial sums lie in memory, where a block of them is added to once for all of these rows.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for step in range(tl.cdiv(rows, programs * ROWS)):
        row = (program + step * programs) * ROWS + tl.arange(0, ROWS)
        row_here = row < rows
        r = tl.load(rstd + row, mask=row_here, other=0.0)[:, None]
        m = 0.0
        if CENTRED:
            m = tl.load(mean + row, mask=row_here, other=0.0)[:, None]
        x_rows, dy_rows = x + row[:, None] * x_row_stride, dy + row[:, None] * dy_row_stride
        sum_g = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        sum_g_xhat = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            here = row_here[:, None] & (column < n)
            xhat = (tl.load(x_rows + column, mask=here, other=0.0).to(tl.float32) - m) * r
            g = tl.load(dy_rows + column, mask=here, other=0.0).to(tl.float32)
            g *= tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)
            sum_g_xhat += g * xhat
            if CENTRED:
                sum_g += g
        mean_g_xhat = (tl.sum(sum_g_xhat, 1) / n)[:, None]
        mean_g = (tl.sum(sum_g, 1) / n)[:, None]
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = column < n
            here = row_here[:, None] & inside
            xhat = (tl.load(x_rows + column, mask=here, other=0.0).to(tl.float32) - m) * r
            dy_tile = tl.load(dy_rows + column, mask=here, other=0.0).to(tl.float32)
            g = dy_tile * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            if CENTRED:
                g -= mean_g
            dx_tile = r * (g - xhat * mean_g_xhat)
            if ADD:
                dtotal_rows = dtotal + row[:, None] * dtotal_row_stride
                dx_tile += tl.load(dtotal_rows + column, mask=here, other=0.0).to(tl.float32)
            tl.store(dx + row[:, None] * n + column, dx_tile.to(dx.dtype.element_ty), mask=here)
            if NARROW:
                tl.store(dbranch + row[:, None] * n + column, dx_tile.to(dbranch.dtype.element_ty), mask=here)
            partial = program * n + column
            before = inside & (step > 0)
            dw = tl.load(dweight_partial + partial, mask=before, other=0.0) + tl.sum(dy_tile * xhat, 0)[None, :]
            tl.store(dweight_partial + partial, dw, mask=inside)
            if CENTRED:
                db = tl.load(dbias_partial + partial, mask=before, other=0.0) + tl.sum(dy_tile, 0)[None, :]
                tl.store(dbias_partial + partial, db, mask=inside)
        tl.debug_barrier()  # the partial sums are stored before any warp adds the next rows to them


def tile(n: int, element_size: int) -> dict[str, int]:
    """The rows and columns of a program's tile, and its warps, for rows of n elements."""
    block = next_power_of_2(n)
    rows = min(_TILE_BYTES // element_size // block, _MAX_ROWS)
    if rows < 2:
        return {"ROWS": 1, "BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(rows * block * element_size // 1024, 1)}


def is_long(n: int, centred: bool, add: bool) -> bool:
    """Whether rows of n elements do not fit in registers."""
    return n > most_in_a_tile(centred, add) or (n > _MAX_ANY_TILE and n % 16 != 0)


def most_in_a_tile(centred: bool, add: bool) -> int:
    return _MAX_TILE // 2 if centred and add else _MAX_TILE


def long_backward(n: int) -> dict[str, int]:
    return _LONG_BACKWARD if n % 16 == 0 else _LONG_ANY_BACKWARD


def programs_of(device: torch.device, long: bool) -> int:
    """How many programs the backward has at most, of which each has partial sums of its own."""
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    each = 1 if long else PROGRAMS_PER_MULTIPROCESSOR
    return each * torch.cuda.get_device_properties(device).multi_processor_count


# ---- the operators. What an op has not, a branch or a bias, is None; what it does not return has no elements.


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _fake_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, n = x.shape
    total = _empty(x, 0 if branch is None else rows, n, dtype=x.dtype)
    mean, rstd = _empty(x, 0 if bias is None else rows), _empty(x, rows)
    return _empty(x, rows, n, dtype=dtype), total, mean, rstd


def _launch_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, n = x.shape
    y, total, mean, rstd = _fake_forward(x, branch, weight, bias, eps, dtype)
    tensors = (x, x if branch is None else branch, weight, weight if bias is None else bias, total, y, mean, rstd)
    strides = (x.stride(0), 0 if branch is None else branch.stride(0))
    kind = {"CENTRED": bias is not None, "ADD": branch is not None}
    if rows and is_long(n, *kind.values()):
        _forward_long[(rows,)](*tensors, *strides, n, eps, **kind, **_LONG_FORWARD)
    elif rows:
        launch = tile(n, x.element_size())
        _forward[(triton.cdiv(rows, launch["ROWS"]),)](*tensors, *strides, rows, n, eps, **kind, **launch)
    return y, total, mean, rstd


def _fake_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbranch = _empty(x, 0 if branch_dtype == x.dtype else x.shape[0], x.shape[1], dtype=branch_dtype)
    dbias = _empty(x, 0) if bias is None else torch.empty_like(bias)
    return _empty(x, *x.shape, dtype=x.dtype), dbranch, torch.empty_like(weight), dbias


def _launch_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, n = x.shape
    dx, dbranch, _, no_dbias = _fake_backward(dy, dtotal, x, weight, bias, mean, rstd, branch_dtype)
    long = is_long(n, bias is not None, dtotal is not None)
    kernel, launch = (_backward_long, long_backward(n)) if long else (_backward, tile(n, x.element_size()))
    # of few rows, each tile has a program of its own
    programs = min(triton.cdiv(rows, launch["ROWS"]), programs_of(x.device, long))
    partials = _empty(x, 1 if bias is None else 2, programs, n)
    if rows:
        kernel[(programs,)](
            dy, dy if dtotal is None else dtotal, x, weight, mean, rstd, dx, dbranch, partials[0], partials[-1],
            dy.stride(0), 0 if dtotal is None else dtotal.stride(0), x.stride(0), rows, n, CENTRED=bias is not None,
            ADD=dtotal is not None, NARROW=branch_dtype != x.dtype, **launch,
        )  # fmt: skip
    dbias = no_dbias if bias is None else partials[1].sum(0).to(bias.dtype)
    return dx, dbranch, partials[0].sum(0).to(weight.dtype), dbias


def row_norm(op: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of (x, branch or None, weight, bias or None, eps, dtype) -> (y in dtype, x + branch or nothing).

    Its operators are torch.ops.weftrain.<op>_forward and _backward. Saves x, or the sum, and the parameters as they
    are, and the statistics in fp32, [rows] each.
    """
    forward_operator = operator(
        f"{op}_forward(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, "
        "Tensor, Tensor, Tensor)",
        _launch_forward,
        _fake_forward,
    )
    backward_operator = operator(
        f"{op}_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd, "
        "ScalarType branch_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
        _launch_backward,
        _fake_backward,
    )

    class RowNorm(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            branch: Tensor | None,
            weight: Tensor,
            bias: Tensor | None,
            eps: float,
            dtype: torch.dtype,
        ) -> tuple[Tensor, Tensor]:
            y, total, mean, rstd = forward_operator(x, branch, weight, bias, eps, dtype)
            ctx.save_for_backward(x if branch is None else total, weight, bias, mean, rstd)
            ctx.branch_dtype = None if branch is None else branch.dtype
            return y, total

        @staticmethod
        @first_derivatives_only(op, "triton")
        def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
            x, weight, bias, mean, rstd = ctx.saved_tensors
            alone = ctx.branch_dtype is None
            dx, dbranch, dweight, dbias = backward_operator(
                rows_of(dy), None if alone else rows_of(dtotal), x, weight, bias, mean, rstd,
                x.dtype if alone else ctx.branch_dtype,
            )  # fmt: skip
            if not alone and ctx.branch_dtype == x.dtype:
                dbranch = dx
            return dx, None if alone else dbranch, dweight, None if bias is None else dbias, None, None

    def apply(
        x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, total = RowNorm.apply(
            rows_of(x),
            None if branch is None else rows_of(branch),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            eps,
            dtype,
        )
        return y.view(x.shape), total if branch is None else total.view(x.shape)

    return apply


# ---- what the registry and the compile gate are told


def norm_implementation(op: str, function: Callable[..., Any], *, centred: bool, add: bool) -> Implementation:
    thresholds = {"hidden_size": most_in_a_tile(centred, add)}
    return implementation(op, function, lambda: _compilations(centred, add), thresholds=thresholds)


# (dtype, n, type of the sizes): hidden states (4096: Amber, CrystalCoder); in fp32, which takes most registers, the
# largest of any size, where nothing is aligned, and the largest in registers; heads, where 80 and 96 make the kernel of
# 128, and 192 that of 256; and rows that are too long, of a size that is aligned and of one that is not.
_SHAPES = (
    *((dtype, 4096, "i32:16") for dtype in TRITON_DTYPES.values()),
    ("fp32", _MAX_ANY_TILE - 1, "i32"),
    ("fp32", _MAX_TILE, "i32:16"),
    *((dtype, n, "i32:16") for dtype in ("bf16", "fp32") for n in (64, 128, 256)),
    ("fp32", 77, "i32"),
    *((dtype, 2 * _MAX_TILE, "i32:16") for dtype in ("bf16", "fp32")),
    ("fp32", _MAX_TILE - 1, "i32"),
)


def _compilations(centred: bool, add: bool) -> list[Compilation]:
    """Both kernels at each shape; of a sum the training's own too, a residual in fp32 and the rest in bf16."""
    found = []
    mixed = [("fp32", n, "bf16", "i32:16") for n in (4096, _MAX_TILE, 2 * _MAX_TILE)] if add else []
    for dtype, n, narrow, size in [*((dtype, n, dtype, size) for dtype, n, size in _SHAPES), *mixed]:
        types = dict.fromkeys(("x", "total", "dx", "dtotal"), f"*{dtype}:16") | {"eps": "fp32"}
        types |= dict.fromkeys(("y", "dy", "branch", "dbranch"), f"*{narrow}:16")
        types |= dict.fromkeys(("weight", "bias", "mean", "rstd", "dweight_partial", "dbias_partial"), "*fp32:16")
        strides = ("x_row_stride", "branch_row_stride", "dy_row_stride", "dtotal_row_stride")
        types |= dict.fromkeys((*strides, "n"), size) | {"rows": "i32"}
        kernels, launches = (_forward, _backward), [tile(n, 4 if dtype == "fp32" else 2)] * 2
        if is_long(n, centred, add):
            kernels, launches = (_forward_long, _backward_long), [_LONG_FORWARD, long_backward(n)]
        kind = f"{dtype} n{n}" if narrow == dtype else f"{dtype} and {narrow} n{n}"
        for name, kernel, launch in zip(("forward", "backward"), kernels, launches, strict=True):
            constants: dict[str, Any] = {"CENTRED": centred, "ADD": add} | (
                {} if name == "forward" else {"NARROW": narrow != dtype}
            )
            constants |= {key: value for key, value in launch.items() if key != "num_warps"}
            found.append(compilation(f"{name} {kind}", kernel, types, constants, launch["num_warps"]))
    return found
