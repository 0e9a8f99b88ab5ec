"""adamw: one pass a tensor, sixteen elements at a time; 28 bytes a parameter with fp32 gradients, or with bf16
gradients and copies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from weftrain.kernels.adamw_scalars import adamw_scalars
from weftrain.kernels.arguments import check_adamw
from weftrain.kernels.contract import Implementation
from weftrain.kernels.cpp_ops._build import FILES, library, pointer, refuse_unless, threads, unavailable, version


@torch.no_grad()
def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    update_index: int,
    eps_placement: str,
    gradient_scale: Tensor,
) -> None:
    """One AdamW update in place (kernels/reference.py); gradients fp32 or bf16 (fp16 is widened first), copies bf16.

    Scalars are computed in double and rounded to fp32 once. Raises KernelError (kernels/arguments.py), and for copies
    that are not bf16.
    """
    check_adamw(parameters, gradients, exp_avgs, exp_avg_sqs, copies, update_index, eps_placement, gradient_scale)
    for parameter in parameters:
        refuse_unless("adamw", True, "float32", parameter)
    *moments, eps, correction, step_size, decay = adamw_scalars(
        eps_placement,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        update_index=update_index,
    )
    # The kernel writes through addresses, of which autograd knows nothing.
    for tensor in (*parameters, *exp_avgs, *exp_avg_sqs, *(copies or ())):
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    after = eps_placement == "after_bias_correction"
    # the kernel multiplies by the correction where the formula divides by it
    constants = (ctypes.c_float * 7)(*moments, eps, 1 / correction if after else correction, step_size, decay)
    step = library().weftrain_adamw
    for index, (parameter, gradient, exp_avg, exp_avg_sq) in enumerate(
        zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True)
    ):
        copy = None if copies is None else copies[index]
        widened = copy is not None and copy.dtype != torch.bfloat16
        dense = (gradient.float() if gradient.dtype == torch.float16 else gradient).contiguous()
        step(
            pointer(parameter),
            pointer(dense),
            ctypes.c_int(dense.dtype == torch.bfloat16),
            pointer(exp_avg),
            pointer(exp_avg_sq),
            pointer(None if widened else copy),
            ctypes.c_int64(parameter.numel()),
            pointer(gradient_scale),
            constants,
            ctypes.c_int(after),
            threads(),
        )
        if widened and copy is not None:  # fp16 copies: a pass of their own, no recipe of ours computes in fp16
            copy.copy_(parameter)


IMPLEMENTATION = Implementation(
    "adamw", "cpp", adamw, unavailable, version(), files=FILES, thresholds={"elements": 1 << 14}
)
