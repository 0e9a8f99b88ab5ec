"""linear_cross_entropy, chunked over tokens: neither all logits nor their gradient ever exist at once.

What a reader would get wrong: the gradients are computed in the *forward*, chunk by chunk, while the chunk's logits are at hand; the
backward only multiplies them by the incoming scalar. Where no gradient is wanted (evaluation), none is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from weftrain.kernels.registry import Implementation

# Logits held at once, in elements. 2^24 x bf16 = 32 MiB lets the CPU's matrix multiplies run at peak (one product of 1024 x 32000 is a
# quarter slower); an accelerator wants larger products.
_CPU_CHUNK_ELEMENTS = 1 << 24
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 27


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logits_scale: float = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    """hidden [N, D], weight [V, D], labels int64 [N] -> fp32 scalar sum of token losses (kernels/reference.py).

    Products in hidden.dtype, softmax in fp32. dW is summed over chunks in fp32. Saves dhidden [N, D] in hidden.dtype and dW [V, D] in
    fp32 (one chunk: weight.dtype). Peak beyond that: one chunk of logits in fp32, about 64 MiB on a CPU.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LossAndGradients.apply(hidden, weight, labels, logits_scale, ignore_index, z_loss)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows in _chunks(hidden, weight):
        total = total + _chunk_loss(hidden[rows], weight, labels[rows], logits_scale, ignore_index, z_loss)[0]
    return total


class _LossAndGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, logits_scale: float, ignore_index: int, z_loss: float
    ) -> Tensor:
        chunks = _chunks(hidden, weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = []
        grad_weight = None
        for rows in chunks:
            chunk = hidden[rows]
            loss, scaled, logsumexp, label, weighting = _chunk_loss(chunk, weight, labels[rows], logits_scale, ignore_index, z_loss)
            total = total + loss
            grad_logits = _chunk_grad(scaled, logsumexp, label, weighting, logits_scale, z_loss, hidden.dtype)  # [n, V]
            grad_hidden.append(grad_logits @ weight)
            partial = grad_logits.t() @ chunk  # [V, D]
            if len(chunks) == 1:
                grad_weight = partial
            else:
                grad_weight = partial.float() if grad_weight is None else grad_weight + partial
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_hidden = (grad_hidden.float() * grad).to(grad_hidden.dtype) if ctx.needs_input_grad[0] else None
        scaled_weight = (grad_weight.float() * grad).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return scaled_hidden, scaled_weight, None, None, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Row slices such that a chunk's logits stay below the limit; at least 64 rows each."""
    limit = _CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS
    size = max(64, limit // weight.shape[0] // 64 * 64)
    return [slice(first, min(first + size, hidden.shape[0])) for first in range(0, hidden.shape[0], size)]


def _chunk_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, logits_scale: float, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss sum, scaled logits fp32 [n, V], logsumexp [n, 1], label [n, 1] (0 where ignored), 1.0 or 0.0 where ignored [n, 1])."""
    scaled = F.linear(hidden, weight).float() * logits_scale
    kept = (labels != ignore_index)[:, None]
    label = torch.where(kept, labels[:, None], 0)
    logsumexp = torch.logsumexp(scaled, -1, keepdim=True)
    loss = logsumexp - scaled.gather(1, label)
    if z_loss:
        loss = loss + z_loss * logsumexp.square()
    weighting = kept.float()
    return (loss * weighting).sum(), scaled, logsumexp, label, weighting


def _chunk_grad(
    scaled: Tensor, logsumexp: Tensor, label: Tensor, weighting: Tensor, logits_scale: float, z_loss: float, dtype: torch.dtype
) -> Tensor:
    """d(loss sum)/d(logits) [n, V]: (softmax * (1 + 2 z logsumexp) - onehot) * logits_scale, in fp32, rounded once."""
    slope = weighting * logits_scale
    factor = slope * (1 + 2 * z_loss * logsumexp) if z_loss else slope
    grad = ((scaled - logsumexp).exp() * factor).to(dtype)
    at_label = (scaled.gather(1, label) - logsumexp).exp() * factor - slope
    return grad.scatter(1, label, at_label.to(dtype))


IMPLEMENTATION = Implementation("linear_cross_entropy", "torch", linear_cross_entropy)
