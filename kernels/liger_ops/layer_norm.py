"""layer_norm by Liger's Triton kernel: fp32 statistics and affine map, rounded once, as the contract wants it."""

from __future__ import annotations

from torch import Tensor

from weftrain.kernels.arguments import check_layer_norm
from weftrain.kernels.contract import Implementation
from weftrain.kernels.derivatives import without_second_derivatives
from weftrain.kernels.liger_ops import _found


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """As kernels/reference.py. Saves x, mean and 1 / std in fp32. Deterministic."""
    check_layer_norm(x, weight, bias)
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return without_second_derivatives(LigerLayerNormFunction.apply(x, weight, bias, eps), "layer_norm", "liger")


IMPLEMENTATION = Implementation("layer_norm", "liger", layer_norm, _found.unavailable, _found.version())
