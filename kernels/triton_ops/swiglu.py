"""swiglu: one pass forward and one backward, which makes silu(gate) anew instead of saving it.

Contiguous inputs are one long row, whatever their shape, so that an awkward width (CrystalCoder's 10922) costs no
aligned loads; rows are taken by their stride only where the inputs are views, as two halves of one product are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.arguments import check_swiglu
from weftrain.kernels.contract import Compilation
from weftrain.kernels.derivatives import first_derivatives_only
from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, compilation, implementation, operator, rows_of

_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) in fp32, without an overflow on the way."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _forward(gate, up, y, gate_row_stride, up_row_stride, n, BLOCK: tl.constexpr):
    """One block of one row: y = gate sigmoid(gate) up in fp32, rounded once."""
    program = tl.program_id(0).to(tl.int64)
    blocks = (n - 1) // BLOCK + 1  # tl.cdiv would overflow an int32 just below 2^31
    row = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    g = tl.load(gate + row * gate_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + column, (g * _sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy, gate, up, dgate, dup, dy_row_stride, gate_row_stride, up_row_stride, n, BLOCK: tl.constexpr):
    """One block of one row: dup = dy silu(gate), dgate = dy up sigmoid (1 + gate (1 - sigmoid))."""
    program = tl.program_id(0).to(tl.int64)
    blocks = (n - 1) // BLOCK + 1  # tl.cdiv would overflow an int32 just below 2^31
    row = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    d = tl.load(dy + row * dy_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    s = _sigmoid(g)
    tl.store(dup + row * n + column, (d * (g * s)).to(dup.dtype.element_ty), mask=inside)
    tl.store(dgate + row * n + column, (d * u * (s * (1.0 + g * (1.0 - s)))).to(dgate.dtype.element_ty), mask=inside)


def _grid_and_width(*inputs: Tensor) -> tuple[tuple[int], int]:
    """(grid, width of a row): contiguous inputs are one row."""
    rows, n = inputs[0].shape
    if all(tensor.is_contiguous() for tensor in inputs):
        rows, n = 1, rows * n
    return (rows * triton.cdiv(n, _BLOCK),), n


def _launch_forward(gate: Tensor, up: Tensor) -> Tensor:
    y = _fake_forward(gate, up)
    if y.numel():
        grid, n = _grid_and_width(gate, up)
        _forward[grid](gate, up, y, gate.stride(0), up.stride(0), n, BLOCK=_BLOCK, num_warps=_NUM_WARPS)
    return y


def _fake_forward(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _launch_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _fake_backward(dy, gate, up)
    if dy.numel():
        grid, n = _grid_and_width(dy, gate, up)
        _backward[grid](
            dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0), n, BLOCK=_BLOCK, num_warps=_NUM_WARPS
        )  # fmt: skip
    return dgate, dup


def _fake_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_forward(gate, up), _fake_forward(gate, up)


_FORWARD = operator("swiglu_forward(Tensor gate, Tensor up) -> Tensor", _launch_forward, _fake_forward)
_BACKWARD = operator(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", _launch_backward, _fake_backward
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _FORWARD(gate, up)

    @staticmethod
    @first_derivatives_only("swiglu", "triton")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _BACKWARD(rows_of(dy), *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As kernels/reference.py, contiguous; fp32 inside, rounded once. Saves gate and up as they are."""
    check_swiglu(gate, up)
    return _SwiGLU.apply(rows_of(gate), rows_of(up)).view(gate.shape)


def _compilations() -> list[Compilation]:
    found = []
    # A multiple of 16: contiguous inputs, and 11008. Not one: rows of 10922 in a product of both halves.
    shapes = [(dtype, "flat and n11008", "i32:16") for dtype in TRITON_DTYPES.values()]
    for dtype, width, size in (*shapes, ("fp32", "rows of n10922", "i32"), ("bf16", "rows of n10922", "i32")):
        types = dict.fromkeys(("gate", "up", "y", "dy", "dgate", "dup"), f"*{dtype}:16")
        types |= dict.fromkeys(("gate_row_stride", "up_row_stride", "dy_row_stride", "n"), size)
        found += [
            compilation(f"{name} {dtype} {width}", kernel, types, {"BLOCK": _BLOCK}, _NUM_WARPS)
            for name, kernel in (("forward", _forward), ("backward", _backward))
        ]
    return found


IMPLEMENTATION = implementation("swiglu", swiglu, _compilations)
