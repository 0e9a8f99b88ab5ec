"""Every op once more, in float64 on a CPU and written independently of the reference: the truth that errors are
measured against.

What a reader would get wrong: these are written over what is *visible*. A key of the future, of another document, or
the logits of an ignored row do not appear in the formula at all, so a NaN there leaves its result finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / ((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight + bias


def rope(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    half = rotary_dim // 2
    out = list(x.unbind(-1))
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = torch.complex(x[..., a], x[..., b]) * torch.complex(cos[:, i], sin[:, i])[:, None]
        out[a], out[b] = turned.real, turned.imag
    return torch.stack(out, -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, document_start: Tensor | None) -> Tensor:
    def one(b: int, t: int) -> Tensor:
        seen = slice(0 if document_start is None else int(document_start[b, t]), t + 1)
        weights = (torch.einsum("hd,shd->sh", q[b, t], k[b, seen]) * scale).exp()
        return torch.einsum("sh,shd->hd", weights / weights.sum(0), v[b, seen])

    if bool(torch.stack([tensor.isfinite().all() for tensor in (q, k, v)]).all()):
        return _attention_of_finite(q, k, v, scale, document_start)
    return torch.stack([torch.stack([one(b, t) for t in range(q.shape[1])]) for b in range(q.shape[0])])


def _attention_of_finite(q: Tensor, k: Tensor, v: Tensor, scale: float, document_start: Tensor | None) -> Tensor:
    """All queries at once: of finite numbers, a weight of 0 is the same as not to appear."""
    position = torch.arange(q.shape[1])
    visible = position[None, None, :] <= position[None, :, None]  # [1, query, key]
    if document_start is not None:
        visible = visible & (position[None, None, :] >= document_start[:, :, None])
    weights = torch.einsum("bthd,bshd->bhts", q, k).mul(scale).exp() * visible[:, None]
    return torch.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdim=True), v)


def cross_entropy(
    logits: Tensor, labels: Tensor, logits_scale: float = 1.0, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    losses = []
    for row, label in zip(logits * logits_scale, labels.tolist(), strict=True):
        if label == ignore_index:
            losses.append(row.new_zeros(()))
            continue
        log_sum = row.exp().sum().log()
        losses.append(log_sum - row[label] + (z_loss * log_sum**2 if z_loss else 0))
    return torch.stack(losses)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, **statics: Any) -> Tensor:
    return cross_entropy(hidden @ weight.mT, labels, **statics).sum()


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
    """In place, as the two papers' pseudo-code and cerebras_pytorch's source have it."""
    for index, (p, m, v) in enumerate(zip(parameters, exp_avgs, exp_avg_sqs, strict=True)):
        g = gradients[index] * gradient_scale
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g**2
        if eps_placement == "after_bias_correction":
            update = (new_m / (1 - beta1**update_index)) / ((new_v / (1 - beta2**update_index)).sqrt() + eps)
        else:
            update = new_m / (new_v.sqrt() + eps) * (1 - beta2**update_index) ** 0.5 / (1 - beta1**update_index)
        p.copy_(p - learning_rate * (update + weight_decay * p))
        m.copy_(new_m)
        v.copy_(new_v)
        if copies is not None:
            copies[index].copy_(p)


def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).square().sum().sqrt()


EXACT: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        rms_norm,
        layer_norm,
        rope,
        swiglu,
        attention,
        cross_entropy,
        linear_cross_entropy,
        adamw,
        grad_norm,
    )
}
