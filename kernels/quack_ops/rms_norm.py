"""rms_norm by QuACK, whose forward and backward stay in fp32 until one rounding."""

from __future__ import annotations

from torch import Tensor

from weftrain.kernels.arguments import check_rms_norm
from weftrain.kernels.contract import Implementation
from weftrain.kernels.derivatives import without_second_derivatives
from weftrain.kernels.quack_ops import _found


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x [..., n], weight [n] -> x.dtype [..., n] (kernels/reference.py). fp32 throughout, rounded once.

    Saves x, weight and 1 / rms in fp32. Deterministic: dweight is summed a block at a time, then over the blocks, whose
    number follows that of the multiprocessors. Launch settings are those of quack's heuristics, not of its tuner.
    """
    check_rms_norm(x, weight)
    from quack.rmsnorm import rmsnorm

    return without_second_derivatives(rmsnorm(x, weight.contiguous(), eps=eps), "rms_norm", "quack")


IMPLEMENTATION = Implementation("rms_norm", "quack", rms_norm, _found.unavailable, _found.version())
