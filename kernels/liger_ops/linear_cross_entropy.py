"""linear_cross_entropy by Liger's fused function, summed, its weight gradient accumulated in fp32.

liger's kernel reads the logit of a label without looking whether there is one, gives no weight gradient where the
hidden state wants none, accumulates dweight in the weight's dtype unless told otherwise, and waits for the device once
a call (it counts the labels). The first three are mended here; the last is the price, and why torch.compile cannot take
it into one graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_linear_cross_entropy
from weftrain.kernels.contract import Attribute, Implementation, KernelError, Spec
from weftrain.kernels.derivatives import without_second_derivatives
from weftrain.kernels.liger_ops import _found

_NO_SOFTCAP = "liger's softcap of the logits has not been held to the contract"
_NO_SMOOTHING = "liger's label smoothing has not been held to the contract"
_NO_WEIGHTS = (
    "liger's fused linear cross-entropy weighs classes, not tokens, and computes the gradients of an unweighted sum in "
    "its forward"
)
_NO_SCALE = (
    "liger's fused linear cross-entropy has no logits_scale, and scaling the hidden state instead would round it anew"
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logits_scale: float = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    logits_softcap: float | None = None,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
) -> Tensor:
    """hidden [N, D], weight [V, D], labels int64 [N] -> fp32 scalar, the sum of the token losses
    (kernels/reference.py).

    Logits and their gradients are rounded to hidden.dtype, chunk by chunk; dweight is summed in fp32. Saves both
    gradients, and scales them in place in the backward, so there can be only one. Raises KernelError for a logits_scale
    other than 1, a logits_softcap, label_smoothing and token_weights.
    """
    check_linear_cross_entropy(hidden, weight, labels, ignore_index, logits_softcap, label_smoothing, token_weights)
    given = {"logits_scale": logits_scale, "logits_softcap": logits_softcap, "label_smoothing": label_smoothing}
    refusal = _not_taken({**given, "token_weights": token_weights is not None})
    if refusal:
        raise KernelError(f"linear_cross_entropy: {refusal}")
    if hidden.shape[0] == 0:
        return (hidden @ weight.T).float().sum()
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    impossible = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
    if weight.requires_grad and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    loss = LigerFusedLinearCrossEntropyFunction.apply(
        hidden.contiguous(),
        weight,
        torch.where(impossible, ignore_index, labels),
        None,  # bias
        None,  # ce_weight
        ignore_index,
        z_loss,
        0.0,  # label_smoothing
        "sum",
        None,  # softcap
        False,  # return_z_loss
        torch.float32,  # accum_dtype
    )[0]
    loss = without_second_derivatives(loss, "linear_cross_entropy", "liger")
    return torch.where(impossible.any(), float("nan"), loss)


def _not_taken(attributes: Mapping[str, Attribute]) -> str | None:
    """Why liger's function is not used with these attributes of a call, or None."""
    if attributes.get("logits_scale", 1.0) != 1.0:
        return _NO_SCALE
    if attributes.get("logits_softcap") is not None:
        return _NO_SOFTCAP
    if attributes.get("label_smoothing"):
        return _NO_SMOOTHING
    return _NO_WEIGHTS if attributes.get("token_weights") else None


def unavailable(spec: Spec) -> str | None:
    return _not_taken(spec.attributes) or _found.unavailable(spec)


IMPLEMENTATION = Implementation("linear_cross_entropy", "liger", linear_cross_entropy, unavailable, _found.version())
