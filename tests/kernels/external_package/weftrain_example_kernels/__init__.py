"""Two kernels of a third party, swiglu with a backward of its own and rms_norm for some widths, and an op of its own with an
implementation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weftrain.kernels import Implementation, Op, Spec
from weftrain.kernels.arguments import check_rms_norm, check_swiglu
from weftrain.kernels.op_parts import Draw, elements, floating, no_rows, read_all_write_like, replaced, size_bytes

VERSION = "weftrain-example-kernels 1.2"


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        gate32 = gate.float()
        return (gate32 * gate32.sigmoid() * up.float()).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gate32, up32, grad32 = gate.float(), up.float(), grad.float()
        sigmoid = gate32.sigmoid()
        grad_gate = grad32 * up32 * sigmoid * (1 + gate32 * (1 - sigmoid))
        return grad_gate.to(gate.dtype), (grad32 * gate32 * sigmoid).to(up.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., n] -> silu(gate) * up, in fp32 and rounded once. Saves gate and up; deterministic."""
    check_swiglu(gate, up)
    return _SwiGLU.apply(gate, up)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x [..., n], weight [n] -> x.dtype [..., n], in fp32 and rounded once. Saves x in fp32; deterministic."""
    check_rms_norm(x, weight)
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _narrow(spec: Spec) -> str | None:
    width = spec.attributes["hidden_size"]
    return None if width <= 4096 else f"needs hidden_size <= 4096, this is {width}"


# ---- an op: its specification, what is known of it, and one more implementation


def _check(x: Tensor) -> None:
    floating("squared_relu", x=x)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 in fp32, rounded once (arXiv 2109.08668): any shape -> the same shape and dtype."""
    _check(x)
    return torch.relu(x.float()).square().to(x.dtype)


def _exact(x: Tensor) -> Tensor:
    return torch.relu(x) ** 2


SQUARED_RELU = Op(
    squared_relu,
    _exact,
    differentiable=("x",),
    examples={
        "odd": lambda device, dtype: {"x": Draw(device, dtype).normal(15, 77)},
        "amber_7b": lambda device, dtype: {"x": Draw(device, dtype).normal(2048, 11008)},
    },
    bytes_moved=read_all_write_like("x"),
    flops=elements("x", 2),
    backward_cost=lambda arguments: (3 * size_bytes(arguments["x"]), 2 * arguments["x"].numel()),
    wrong={"x of integers": replaced("x", torch.Tensor.int)},
    edges={"no rows": no_rows("x")},
)


def squared_relu_by_maximum(x: Tensor) -> Tensor:
    """As squared_relu, with maximum, whose gradient shows a NaN; that of clamp hides it."""
    _check(x)
    return torch.maximum(x.float(), torch.zeros((), device=x.device)).square().to(x.dtype)


IMPLEMENTATIONS = [
    Implementation("swiglu", "example", swiglu, version=VERSION),
    Implementation("rms_norm", "example", rms_norm, _narrow, VERSION),
    Implementation("squared_relu", "example", squared_relu_by_maximum, version=VERSION),
]
