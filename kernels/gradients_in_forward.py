"""What the implementations of linear_cross_entropy share that compute the gradients in the *forward*.

A chunk's logits are at hand there, so neither all logits nor their gradient ever exist at once; the backward only
multiplies the saved gradients by the incoming scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.derivatives import first_derivatives_only

# of an operator that computes the loss and the gradients that are wanted; one that is not wanted has no elements
SIGNATURE = (
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? token_weights, float logits_scale, int ignore_index, "
    "float z_loss, float? logits_softcap, float label_smoothing, bool wants_hidden, bool wants_weight) "
    "-> (Tensor, Tensor, Tensor)"
)


def empty_results(
    hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What such an operator returns, uninitialized: (loss, d hidden, d weight)."""
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape if wants_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.empty(weight.shape if wants_weight else (0,), dtype=weight_dtype, device=weight.device)
    return loss, grad_hidden, grad_weight


def differentiable_loss(
    source: str,
    compute: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]],
    slab_rows: int | None = None,
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor] | None = None,
) -> Callable[..., Tensor]:
    """The function of (hidden, weight, labels, token_weights, logits_scale, ignore_index, z_loss, logits_softcap,
    label_smoothing) whose forward is `compute`.

    compute takes wants_hidden and wants_weight besides, and returns (loss, d hidden, d weight); the latter may be in
    fp32. slab_rows: how many rows of a gradient the backward scales together, so that its fp32 temporary stays small.
    scaled: (gradient, 0-dim fp32, dtype) -> their product in `dtype`, where a source has a kernel of its own for it.
    """
    multiplied = scaled or partial(_scaled, slab_rows=slab_rows)

    class LossAndGradients(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            hidden: Tensor,
            weight: Tensor,
            labels: Tensor,
            token_weights: Tensor | None,
            *statics: Any,
        ) -> Tensor:
            """statics: logits_scale, ignore_index, z_loss, logits_softcap, label_smoothing."""
            wants_hidden, wants_weight = ctx.needs_input_grad[:2]
            loss, grad_hidden, grad_weight = compute(
                hidden, weight, labels, token_weights, *statics, wants_hidden, wants_weight
            )
            ctx.save_for_backward(grad_hidden if wants_hidden else None, grad_weight if wants_weight else None)
            ctx.dtype = hidden.dtype
            return loss

        @staticmethod
        @first_derivatives_only("linear_cross_entropy", source)
        def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
            hidden, weight = (
                None if saved is None else multiplied(saved, incoming, ctx.dtype) for saved in ctx.saved_tensors
            )
            return hidden, weight, None, None, None, None, None, None, None

    return LossAndGradients.apply


def slabs(rows: int, slab_rows: int) -> list[slice]:
    """Consecutive slices of `rows` rows, of slab_rows each."""
    return [slice(first, min(first + slab_rows, rows)) for first in range(0, rows, slab_rows)]


def _scaled(gradient: Tensor, incoming: Tensor, dtype: torch.dtype, slab_rows: int | None) -> Tensor:
    if slab_rows is None:
        return (gradient.float() * incoming).to(dtype)
    scaled = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    for part in slabs(gradient.shape[0], slab_rows):
        scaled[part] = gradient[part].float() * incoming
    return scaled
