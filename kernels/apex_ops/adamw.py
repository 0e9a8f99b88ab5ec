"""adamw by NVIDIA apex's multi-tensor kernel: one launch for many tensors, with a pass before it and one after.

The kernel takes gradients, parameters and moments of *one* dtype without looking, folds in no clip coefficient (its
capturable variants do, and write the scaled gradient back, which our contract forbids) and refreshes no bf16 copies. So
a scaled fp32 gradient is made first and the copies are refreshed afterwards: 12 to 20 bytes a parameter more than one
pass needs. Betas reach it as fp32, so 1 - beta is off by 2e-7 at 0.95 and by 1e-5 at 0.999, in exp_avg_sq as in its
correction, where it cancels. Read in apex/optimizers/fused_adam.py and csrc/multi_tensor_adam.cu of NVIDIA/apex, commit
004da4e.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weftrain.kernels.apex_ops import _found
from weftrain.kernels.arguments import check_adamw
from weftrain.kernels.contract import Implementation, KernelError, Spec

_ADAMW_MODE = 1  # decoupled weight decay; 0 is L2
_BIAS_CORRECTION = 1
_EPSILON = (
    "apex adds epsilon after the bias correction; it has no 'before_bias_correction' (cerebras_pytorch's placement)"
)


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
    """One AdamW update in place, arguments as in kernels/reference.py, eps_placement 'after_bias_correction' only.

    Needs 4 bytes a parameter for the scaled gradient. No synchronisation. Deterministic. Raises KernelError for the
    other placement and for tensors of 2^31 elements and more, which older builds index with 32 bits.
    """
    check_adamw(parameters, gradients, exp_avgs, exp_avg_sqs, copies, update_index, eps_placement, gradient_scale)
    if eps_placement != "after_bias_correction":
        raise KernelError(f"adamw: {_EPSILON}")
    used = [index for index, parameter in enumerate(parameters) if parameter.numel()]
    if not used:
        return
    for index in used:
        if parameters[index].numel() >= 2**31:
            raise KernelError(
                f"adamw: parameters[{index}] has {parameters[index].numel():,} elements; apex takes fewer than 2^31"
            )
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    scaled = torch._foreach_mul([gradients[index].float().contiguous() for index in used], gradient_scale)
    state = [[tensors[index] for index in used] for tensors in (parameters, exp_avgs, exp_avg_sqs)]
    # demanded, and not looked at by this kernel
    overflow = torch.zeros(1, dtype=torch.int32, device=parameters[0].device)
    multi_tensor_applier(
        amp_C.multi_tensor_adam,
        overflow,
        [list(scaled), *state],
        learning_rate,
        beta1,
        beta2,
        eps,
        update_index,
        _ADAMW_MODE,
        _BIAS_CORRECTION,
        weight_decay,
    )
    if copies is not None:
        torch._foreach_copy_([copies[index] for index in used], state[0])


def unavailable(spec: Spec) -> str | None:
    if spec.attributes.get("eps_placement", "after_bias_correction") != "after_bias_correction":
        return _EPSILON
    return _found.unavailable(spec, "multi_tensor_apply", "amp_C")


IMPLEMENTATION = Implementation("adamw", "apex", adamw, unavailable, _found.version())
