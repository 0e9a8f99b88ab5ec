"""adamw in one generated pass a tensor: moments, weight and its bf16 copy are read once and written once.

The pass is compiled by itself (even where the model is not), once for each dtype of gradient, presence of copies and
placement of epsilon. Learning rate and step are *tensor elements*, and sizes are dynamic: none of them compiles
anything anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weftrain.kernels.adamw_scalars import adamw_scalars
from weftrain.kernels.arguments import check_adamw
from weftrain.kernels.contract import Implementation
from weftrain.kernels.torch_ops._generated import needs_compiler


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
    """One AdamW update in place, arguments as in kernels/reference.py; all but the gradients contiguous.

    28 bytes a parameter are moved with bf16 gradients and copies. Raises KernelError (kernels/arguments.py).
    """
    check_adamw(parameters, gradients, exp_avgs, exp_avg_sqs, copies, update_index, eps_placement, gradient_scale)
    if not parameters:
        return
    scalars = adamw_scalars(
        eps_placement,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        update_index=update_index,
    )
    device, on_device = parameters[0].device, torch.tensor(scalars, dtype=torch.float32)
    if device.type != "cpu":  # from pinned memory, since a pageable copy would wait for the device
        on_device = on_device.pin_memory().to(device, non_blocking=True)
    compiled = _compiled(eps_placement)
    for index, (parameter, gradient, exp_avg, exp_avg_sq) in enumerate(
        zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True)
    ):
        # One element would be a compilation of its own: torch.compile treats sizes 0 and 1 as constants.
        update = compiled if parameter.numel() > 1 else _UPDATES[eps_placement]
        update(
            _flat(parameter),
            _flat(gradient.contiguous()),
            _flat(exp_avg),
            _flat(exp_avg_sq),
            None if copies is None else _flat(copies[index]),
            gradient_scale,
            on_device,
        )


def _flat(tensor: Tensor) -> Tensor:
    """[...] -> [n] on the same storage, detached: torch.compile would guard on the base's shape."""
    return tensor.view(-1).detach()


@functools.cache
def _compiled(eps_placement: str) -> Callable[..., None]:
    return torch.compile(_UPDATES[eps_placement], dynamic=True, fullgraph=True)


def _update_after(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    gradient_scale: Tensor,
    scalars: Tensor,
) -> None:
    momentum, variance = _moments(gradient, exp_avg, exp_avg_sq, gradient_scale, scalars)
    eps, correction2_sqrt, step_size, decay = scalars[3:].unbind()
    updated = parameter * decay - step_size * (momentum / (variance.sqrt() / correction2_sqrt + eps))
    _store(parameter, exp_avg, exp_avg_sq, copy, updated, momentum, variance)


def _update_before(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    gradient_scale: Tensor,
    scalars: Tensor,
) -> None:
    momentum, variance = _moments(gradient, exp_avg, exp_avg_sq, gradient_scale, scalars)
    eps, correction, learning_rate, weight_decay = scalars[3:].unbind()
    updated = parameter - learning_rate * (momentum / (variance.sqrt() + eps) * correction + weight_decay * parameter)
    _store(parameter, exp_avg, exp_avg_sq, copy, updated, momentum, variance)


def _moments(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient_scale: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor]:
    one_minus_beta1, beta2, one_minus_beta2 = scalars[:3].unbind()
    scaled = gradient.float() * gradient_scale
    return exp_avg + one_minus_beta1 * (scaled - exp_avg), exp_avg_sq * beta2 + one_minus_beta2 * scaled * scaled


def _store(
    parameter: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    updated: Tensor,
    momentum: Tensor,
    variance: Tensor,
) -> None:
    exp_avg.copy_(momentum)
    exp_avg_sq.copy_(variance)
    parameter.copy_(updated)
    if copy is not None:
        copy.copy_(updated)


_UPDATES: dict[str, Callable[..., None]] = {
    "after_bias_correction": _update_after,
    "before_bias_correction": _update_before,
}

IMPLEMENTATION = Implementation("adamw", "torch", adamw, needs_compiler)
