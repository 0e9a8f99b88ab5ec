"""rms_norm by Liger's Triton kernel in its "gemma" casting mode.

The default mode of liger's, "llama", rounds the normalised row to x.dtype *before* it multiplies by the weight, which
is Hugging Face's order and not Amber's. "gemma" stays in fp32 to the end; Gemma's other trait, weight + 1, is the
offset, here 0.
"""

from __future__ import annotations

from torch import Tensor

from weftrain.kernels.arguments import check_rms_norm
from weftrain.kernels.contract import Implementation
from weftrain.kernels.derivatives import without_second_derivatives
from weftrain.kernels.liger_ops import _found


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x [..., n], weight [n] -> x.dtype [..., n] (kernels/reference.py). fp32 throughout, rounded once. Saves x and 1 /
    rms in fp32.

    Deterministic: dweight is summed a multiprocessor at a time, then over them. in_place=False, or the incoming
    gradient, which may belong to a residual branch too, would be overwritten by dx.
    """
    check_rms_norm(x, weight)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return without_second_derivatives(
        LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False), "rms_norm", "liger"
    )


IMPLEMENTATION = Implementation("rms_norm", "liger", rms_norm, _found.unavailable, _found.version())
