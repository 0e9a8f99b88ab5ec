"""cross_entropy by one logsumexp, which z_loss shares; the backward recomputes the softmax from it."""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_cross_entropy
from weftrain.kernels.contract import Implementation


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    logits_scale: float = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    logits_softcap: float | None = None,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
) -> Tensor:
    """As kernels/reference.py. Saves the logits in fp32."""
    check_cross_entropy(logits, labels, ignore_index, logits_softcap, label_smoothing, token_weights)
    scaled = logits.float() * logits_scale
    if logits_softcap is not None:
        scaled = torch.tanh(scaled / logits_softcap) * logits_softcap
    kept = labels != ignore_index
    outside = kept & ((labels < 0) | (labels >= logits.shape[1]))
    label = torch.where(kept & ~outside, labels, 0)
    # The row's maximum is subtracted first: of logits near 3e4 a logsumexp has lost four digits that loss and gradient
    # need.
    maximum = scaled.detach().amax(-1, keepdim=True)
    shifted = scaled - maximum
    log_total = torch.logsumexp(shifted, -1)
    at_label = shifted.gather(1, label[:, None]).squeeze(1)
    if label_smoothing:
        at_label = (1 - label_smoothing) * at_label + label_smoothing * shifted.mean(-1)
    loss = log_total - at_label
    if z_loss:
        loss = loss + z_loss * (log_total + maximum.squeeze(1)).square()
    if token_weights is not None:
        loss = loss * token_weights.detach().masked_fill(~kept, 0.0)
    return torch.where(kept, loss, 0.0).masked_fill(outside, float("nan"))


IMPLEMENTATION = Implementation("cross_entropy", "torch", cross_entropy)
