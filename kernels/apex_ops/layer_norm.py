"""layer_norm by NVIDIA apex's fused kernel, given fp32 weight and bias.

As in rms_norm.py, apex computes the affine map and its result in the dtype of weight and bias. With both in fp32
nothing is rounded before the cast below. Read in NVIDIA/apex, commit 014f30f.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.kernels.apex_ops import _found
from weftrain.kernels.arguments import check_layer_norm
from weftrain.kernels.contract import Implementation, Spec
from weftrain.kernels.derivatives import without_second_derivatives


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """x [..., n], weight and bias [n] -> x.dtype [..., n] (kernels/reference.py). Welford statistics and affine map in
    fp32.

    Saves x, mean and 1 / std in fp32. Deterministic. fp32 goes through apex's torch operator and can be compiled; bf16
    and fp16 go through an autograd.Function that torch.compile cannot trace.
    """
    check_layer_norm(x, weight, bias)
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, mixed_dtype_fused_layer_norm_affine

    if x.numel() == 0:
        # apex launches a grid of 0 blocks, which CUDA refuses
        return (x.float() * weight.float() + bias.float()).to(x.dtype)
    function = fused_layer_norm_affine if x.dtype == torch.float32 else mixed_dtype_fused_layer_norm_affine
    with torch.autocast("cuda", enabled=False):  # apex casts its arguments where autocast is on
        y = function(x, weight.float(), bias.float(), (x.shape[-1],), eps, memory_efficient=False).to(x.dtype)
    return without_second_derivatives(y, "layer_norm", "apex")


def unavailable(spec: Spec) -> str | None:
    return _found.unavailable(spec, "normalization", "fused_layer_norm_cuda")


IMPLEMENTATION = Implementation("layer_norm", "apex", layer_norm, unavailable, _found.version())
