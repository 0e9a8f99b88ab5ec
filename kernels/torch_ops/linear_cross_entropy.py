"""linear_cross_entropy, chunked over tokens: neither all logits nor their gradient ever exist at once.

The gradients are computed in the *forward*, chunk by chunk, while the chunk's logits are at hand; the backward only
multiplies them by the incoming scalar. Where no gradient is wanted (evaluation), none is computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import check_linear_cross_entropy
from weftrain.kernels.contract import Implementation
from weftrain.kernels.derivatives import outside_autocast
from weftrain.kernels.gradients_in_forward import differentiable_loss
from weftrain.kernels.reference import cross_entropy

# Logits held at once, in elements. 2^24 x bf16 = 32 MiB lets the CPU's matrix multiplies run at peak (one product of
# 1024 x 32000 is a quarter slower); an accelerator wants larger products.
_CPU_CHUNK_ELEMENTS = 1 << 24
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 27


@outside_autocast
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
    """hidden [N, D], weight [V, D], labels int64 [N] -> fp32 scalar sum of token losses (kernels/reference.py).

    Products in hidden.dtype, softmax in fp32. dW is summed over chunks in fp32. Saves dhidden [N, D] in hidden.dtype
    and dW [V, D] in fp32 (one chunk: weight.dtype). Peak beyond that: one chunk of logits in fp32, about 64 MiB on a
    CPU.
    """
    check_linear_cross_entropy(hidden, weight, labels, ignore_index, logits_softcap, label_smoothing, token_weights)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        statics = (logits_scale, ignore_index, z_loss, logits_softcap, label_smoothing)
        return _DIFFERENTIABLE(hidden, weight, labels, token_weights, *statics)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows in _chunks(hidden, weight):
        logits = F.linear(hidden[rows], weight)
        losses = cross_entropy(
            logits,
            labels[rows],
            logits_scale=logits_scale,
            ignore_index=ignore_index,
            z_loss=z_loss,
            logits_softcap=logits_softcap,
            label_smoothing=label_smoothing,
            token_weights=None if token_weights is None else token_weights[rows],
        )
        total = total + losses.sum()
    return total


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    logits_scale: float,
    ignore_index: int,
    z_loss: float,
    logits_softcap: float | None,
    label_smoothing: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden, grad_weight = [], None
    for rows in _chunks(hidden, weight):
        chunk = hidden[rows]  # [n, D]
        weights = None if token_weights is None else token_weights[rows]
        loss, slope, row_scale = _chunk(
            chunk, weight, labels[rows], weights, logits_scale, ignore_index, z_loss, logits_softcap, label_smoothing
        )
        total = total + loss
        if wants_hidden:
            grad_hidden.append(((slope @ weight) * row_scale).to(hidden.dtype))
        if wants_weight:
            partial = slope.t() @ (chunk * row_scale).to(chunk.dtype)  # [V, D]
            grad_weight = partial if grad_weight is None else grad_weight.float() + partial
    return total, torch.cat(grad_hidden) if wants_hidden else None, grad_weight


_DIFFERENTIABLE = differentiable_loss("torch", _loss_and_gradients)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of at least 64 rows whose logits stay below the limit; one slice even of no rows."""
    limit = _CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS
    size = max(64, limit // weight.shape[0] // 64 * 64)
    return [slice(first, min(first + size, hidden.shape[0])) for first in range(0, max(hidden.shape[0], 1), size)]


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    logits_scale: float,
    ignore_index: int,
    z_loss: float,
    logits_softcap: float | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss sum, slope [n, V] in hidden.dtype, row_scale fp32 [n, 1]): d(loss sum)/d(logits) = slope * row_scale.

    The gradient (softmax * (1 + 2 z logsumexp) - onehot) * logits_scale is kept as exp(scaled - max) with one entry a
    row replaced, times a factor a row. The factor goes into the small [n, D] operands instead of the logits, which
    saves a pass and an exp over [n, V]; so does a token's weight. What smoothing moves from the label to all classes,
    and a softcap's derivative, 1 - tanh^2, go into the slope.
    """
    scaled = F.linear(hidden, weight).float() * logits_scale
    if logits_softcap is not None:
        tanh = torch.tanh(scaled / logits_softcap)
        scaled = tanh * logits_softcap
    kept = (labels != ignore_index)[:, None]
    # NaN: values are not looked at on every device
    outside = kept & ((labels < 0) | (labels >= weight.shape[0]))[:, None]
    label = torch.where(kept & ~outside, labels[:, None], 0)
    at_label = scaled.gather(1, label)
    maximum = scaled.amax(-1, keepdim=True)
    exponential = (scaled - maximum).exp()
    total = exponential.sum(-1, keepdim=True)
    log_total = total.log()
    logsumexp = log_total + maximum
    # not logsumexp - at_label, which loses digits where all logits have a common offset
    loss = log_total + (maximum - at_label)
    if label_smoothing:
        below = (scaled - maximum).mean(-1, keepdim=True)
        loss = log_total + (1 - label_smoothing) * (maximum - at_label) - label_smoothing * below
    stretch = torch.ones_like(logsumexp)
    if z_loss:
        loss = loss + z_loss * logsumexp.square()
        stretch = 1 + 2 * z_loss * logsumexp
    slope_at_label = (at_label - maximum).exp() - total / stretch
    if label_smoothing:
        everywhere = label_smoothing / weight.shape[0] * (total / stretch)
        slope_at_label = (at_label - maximum).exp() - (1 - label_smoothing) * (total / stretch) - everywhere
        exponential = exponential - everywhere
    if logits_softcap is not None:
        derivative = 1 - tanh.square()
        exponential, slope_at_label = exponential * derivative, slope_at_label * derivative.gather(1, label)
    slope = exponential.to(hidden.dtype).scatter(1, label, slope_at_label.to(hidden.dtype))
    row_scale = stretch * logits_scale / total
    if token_weights is not None:
        weights = token_weights.masked_fill(~kept[:, 0], 0.0)[:, None]
        loss, row_scale = loss * weights, row_scale * weights
    loss = loss.masked_fill(~kept, 0.0).masked_fill(outside, float("nan"))
    return loss.sum(), slope, kept * row_scale


IMPLEMENTATION = Implementation(
    "linear_cross_entropy", "torch", linear_cross_entropy, thresholds={"logits": _CPU_CHUNK_ELEMENTS}
)
