"""Two kernels of a third party: swiglu with a backward of its own, and rms_norm for some widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weftrain.kernels import Implementation, Spec
from weftrain.kernels.arguments import check_rms_norm, check_swiglu

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


IMPLEMENTATIONS = [
    Implementation("swiglu", "example", swiglu, version=VERSION),
    Implementation("rms_norm", "example", rms_norm, _narrow, VERSION),
]
