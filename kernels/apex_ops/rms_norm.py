"""rms_norm by NVIDIA apex's fused kernel, given an fp32 weight.

Apex rounds the normalised row to the *weight's* dtype before it multiplies, and its result has the weight's dtype. With
a weight as coarse as x that is two roundings, which is not the contract. With an fp32 weight (the "mixed dtype"
function) all is fp32, and the one rounding is the cast below; the price is an fp32 output in between, 12 bytes an
element instead of 4. Read in apex/normalization/fused_layer_norm.py and csrc/layer_norm_cuda_kernel.cu of NVIDIA/apex,
commit 014f30f.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.kernels.apex_ops import _found
from weftrain.kernels.arguments import check_rms_norm
from weftrain.kernels.contract import Implementation, Spec
from weftrain.kernels.derivatives import without_second_derivatives


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x [..., n], weight [n] -> x.dtype [..., n] (kernels/reference.py). Statistics, product and gradient sums in fp32.

    Saves x and 1 / rms in fp32. Deterministic: dweight is summed in two stages, without atomics. fp32 goes through
    apex's torch operator and can be compiled; bf16 and fp16 go through an autograd.Function that torch.compile cannot
    trace.
    """
    check_rms_norm(x, weight)
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine, mixed_dtype_fused_rms_norm_affine

    if x.numel() == 0:
        return (x.float() * weight.float()).to(x.dtype)  # apex launches a grid of 0 blocks, which CUDA refuses
    function = fused_rms_norm_affine if x.dtype == torch.float32 else mixed_dtype_fused_rms_norm_affine
    with torch.autocast("cuda", enabled=False):  # apex casts its arguments where autocast is on
        y = function(x, weight.float(), (x.shape[-1],), eps, memory_efficient=False).to(x.dtype)
    return without_second_derivatives(y, "rms_norm", "apex")


def unavailable(spec: Spec) -> str | None:
    return _found.unavailable(spec, "normalization", "fused_layer_norm_cuda")


IMPLEMENTATION = Implementation("rms_norm", "apex", rms_norm, unavailable, _found.version())
