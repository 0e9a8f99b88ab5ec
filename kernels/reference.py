"""Every op as plain torch: the specification that all implementations are held to.

These are written to be correct, not fast. In fp32 their forward equals Hugging Face's eager Llama bit for bit, so the
order of multiplications is part of the contract. Layouts: activations [..., hidden], heads [B, T, H, D]. Autograd
differentiates them; what it saves is noted at each op. Tensors may be non-contiguous. Invalid arguments raise
KernelError, by the op's check in kernels/arguments.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import (
    check_adamw,
    check_add_layer_norm,
    check_add_rms_norm,
    check_attention,
    check_cross_entropy,
    check_grad_norm,
    check_grouped_gemm,
    check_layer_norm,
    check_linear_cross_entropy,
    check_newton_schulz,
    check_rms_norm,
    check_rope,
    check_swiglu,
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x [..., n], weight [n] -> x.dtype [..., n]: x / sqrt(mean(x^2) + eps) * weight.

    Reduced in fp32 and multiplied by the fp32 weight *before* the cast back, as Amber does (arXiv 1910.07467). Saves x
    in fp32.
    """
    check_rms_norm(x, weight)
    return _rms_normed(x, weight, eps).to(x.dtype)


def _rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight.float() * normed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """x [..., n], weight and bias [n] -> x.dtype [..., n]. Statistics and affine map in fp32 (arXiv 1607.06450). Saves
    x in fp32.
    """
    check_layer_norm(x, weight, bias)
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps).to(x.dtype)


def add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """residual, branch [..., n], weight [n] -> residual + branch in residual.dtype, and its rms_norm in `dtype`.

    branch is in residual's dtype, or in a narrower one beside an fp32 residual. The norm is of the rounded sum, taken
    in fp32 and rounded once. Saves the sum in fp32.
    """
    check_add_rms_norm(residual, branch, weight, dtype)
    total = residual + branch
    return total, _rms_normed(total, weight, eps).to(dtype)


def add_layer_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As add_rms_norm, with bias [n]: residual + branch in residual.dtype, and its layer_norm in `dtype`."""
    check_add_layer_norm(residual, branch, weight, bias, dtype)
    total = residual + branch
    return total, F.layer_norm(total.float(), (total.shape[-1],), weight.float(), bias.float(), eps).to(dtype)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k [B, T, H_kv, D] -> both turned by their positions, in q.dtype (arXiv 2104.09864).

    cos and sin: fp32 [T, rotary_dim / 2], or [B, T, rotary_dim / 2] where rows have positions of their own; cast to
    q.dtype after the trigonometry, and the products are taken in q.dtype. The first rotary_dim dimensions turn, the
    others pass. Pairs are (i, i + rotary_dim/2), or (2i, 2i+1) where interleaved. Saves cos and sin.
    """
    check_rope(q, k, cos, sin, rotary_dim)
    return _turned(q, cos, sin, rotary_dim, interleaved), _turned(k, cos, sin, rotary_dim, interleaved)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    cos = cos.to(x.dtype)[..., None, :]  # [T, 1, rotary_dim / 2], or [B, T, 1, rotary_dim / 2]
    sin = sin.to(x.dtype)[..., None, :]
    turning = x[..., :rotary_dim]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, -1)
    turned_first = first * cos + -second * sin
    turned_second = second * cos + first * sin
    if interleaved:
        turned = torch.stack((turned_first, turned_second), -1).flatten(-2)
    else:
        turned = torch.cat((turned_first, turned_second), -1)
    return torch.cat((turned, x[..., rotary_dim:]), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., n] -> silu(gate) * up in their dtype (arXiv 2002.05202). Saves both and silu(gate)."""
    check_swiglu(gate, up)
    return F.silu(gate) * up


def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, K], weight [E, M, K], ends int32 [E] -> x.dtype [N, M]: row n times the transposed matrix of its group.

    Group 0 has the rows before ends[0], and group e those from ends[e - 1] to before ends[e]: none where both are
    equal, and then its gradient is 0. Rows from ends[E - 1] on are in no group, and become 0. Products are F.linear's.
    """
    check_grouped_gemm(x, weight, ends)
    last = ends.tolist()
    rows = [x[first:end] for first, end in zip([0, *last], last, strict=False)]
    found = [F.linear(part, weight[group]) for group, part in enumerate(rows)]
    return torch.cat([*found, x.new_zeros(len(x) - last[-1], weight.shape[1])])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention: q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D] in q.dtype.

    H is a multiple of H_kv, and query head h reads key head h // (H / H_kv) (arXiv 2305.13245). Query t sees keys
    max(document_start[b, t], t - window + 1)..t: document_start is int32 [B, T] with values in 0..t (None: 0), and a
    window counts the query itself (None: no window; arXiv 2004.05150). Scores in q.dtype, softmax in fp32,
    probabilities cast to q.dtype before they meet v. Saves q, repeated k and v, and the [B, H, T, T] probabilities.
    """
    check_attention(q, k, v, document_start, window)
    heads = q.shape[2]
    q = q.transpose(1, 2)  # [B, H, T, D]
    k, v = (_repeated(tensor.transpose(1, 2), heads) for tensor in (k, v))
    position = torch.arange(q.shape[2], device=q.device)
    hidden = position[None, :] > position[:, None]  # [query, key]
    if window is not None:
        hidden = hidden | (position[None, :] <= position[:, None] - window)
    if document_start is not None:
        hidden = hidden | (position < document_start[:, None, :, None])  # [B, 1, query, key]
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    scores = scores.masked_fill(hidden, float("-inf"))
    probabilities = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(probabilities, v).transpose(1, 2)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """[B, H_kv, T, D] -> [B, heads, T, D], each head as often as query heads read it, one after the other."""
    B, kv_heads, T, D = x.shape
    if kv_heads == heads:  # a traced graph of as many heads of k as of q has no operation for it
        return x
    return x[:, :, None].expand(B, kv_heads, heads // max(kv_heads, 1), T, D).reshape(B, heads, T, D)


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
    """logits [N, V], labels int64 [N] -> fp32 [N]: logsumexp(s x) - (s x)[label] + z_loss * logsumexp(s x)^2, and 0
    where ignored.

    Scaled and reduced in fp32; z_loss as in PaLM (arXiv 2204.02311, section 5). logits_softcap: cap * tanh(s x / cap)
    stands in the place of s x (Gemma 2, arXiv 2408.00118). label_smoothing e: (1 - e) (s x)[label] + e mean(s x) stands
    in the place of (s x)[label] (arXiv 1512.00567, section 7; torch's F.cross_entropy). token_weights, fp32 [N]: what
    each token's whole loss is multiplied by; it may be negative, it receives no gradient, and that of an ignored token
    is not looked at. Saves the log-probabilities in fp32.
    A label outside 0..V-1 gives NaN where values are not looked at (kernels/arguments.py).
    """
    check_cross_entropy(logits, labels, ignore_index, logits_softcap, label_smoothing, token_weights)
    outside = ((labels < 0) | (labels >= logits.shape[1])) & (labels != ignore_index)
    scaled = logits.float() * logits_scale
    if logits_softcap is not None:
        scaled = torch.tanh(scaled / logits_softcap) * logits_softcap
    loss = F.cross_entropy(
        scaled,
        labels.masked_fill(outside, 0),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if z_loss:
        penalty = z_loss * torch.logsumexp(scaled, -1).square()
        loss = loss + penalty.masked_fill(labels == ignore_index, 0.0)
    if token_weights is not None:
        loss = loss * token_weights.detach().masked_fill(labels == ignore_index, 0.0)
    return loss.masked_fill(outside, float("nan"))


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
    """hidden [N, D], weight [V, D], labels int64 [N] -> fp32 scalar: the SUM of cross_entropy(hidden @ weight^T,
    labels), its options included.

    Logits are rounded to hidden.dtype by the product, then scaled (and capped) in fp32. Saves all [N, V] logits.
    """
    check_linear_cross_entropy(hidden, weight, labels, ignore_index, logits_softcap, label_smoothing, token_weights)
    logits = F.linear(hidden, weight)
    losses = cross_entropy(
        logits,
        labels,
        logits_scale=logits_scale,
        ignore_index=ignore_index,
        z_loss=z_loss,
        logits_softcap=logits_softcap,
        label_smoothing=label_smoothing,
        token_weights=token_weights,
    )
    return losses.sum()


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
    """One AdamW update of one parameter group, in place (arXiv 1711.05101).

    parameters, exp_avgs, exp_avg_sqs: fp32; gradients: fp32, bf16 or fp16, left as they were; copies: bf16 or fp16
    compute copies to refresh from the new parameters, or None. update_index: t, from 1. gradient_scale: 0-dim fp32 (the
    clip coefficient), multiplied into each gradient. eps_placement:
      after_bias_correction (torch.optim.AdamW, bit for bit):
        p *= 1 - lr wd;  p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
      before_bias_correction (cerebras_pytorch's AdamW):
        p -= lr * (m / (sqrt(v) + eps) * sqrt(1 - b2^t) / (1 - b1^t) + wd p)
    """
    check_adamw(parameters, gradients, exp_avgs, exp_avg_sqs, copies, update_index, eps_placement, gradient_scale)
    correction1 = 1 - beta1**update_index
    correction2_sqrt = (1 - beta2**update_index) ** 0.5
    for index, (parameter, exp_avg, exp_avg_sq) in enumerate(zip(parameters, exp_avgs, exp_avg_sqs, strict=True)):
        gradient = gradients[index].float() * gradient_scale
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if eps_placement == "after_bias_correction":
            parameter.mul_(1 - learning_rate * weight_decay)
            denominator = (exp_avg_sq.sqrt() / correction2_sqrt).add_(eps)
            parameter.addcdiv_(exp_avg, denominator, value=-learning_rate / correction1)
        else:
            update = exp_avg / exp_avg_sq.sqrt().add_(eps) * (correction2_sqrt / correction1)
            parameter.sub_(learning_rate * (update + weight_decay * parameter))
        if copies is not None:
            copies[index].copy_(parameter)


def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Global L2 norm, 0-dim fp32: the norm of the per-tensor fp32 norms, stacked in the order given.

    For fp32 gradients bit for bit what torch.nn.utils.clip_grad_norm_ computes; the order of tensors is part of the
    result.
    """
    check_grad_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def newton_schulz(x: Tensor, *, a: float, b: float, c: float, iterations: int, eps: float) -> Tensor:
    """x [..., m, n] with its singular values moved towards 1, in x.dtype; the singular vectors stay.

    y = x / max(|x|, eps), with the Frobenius norm in fp32; then, `iterations` times, y = a y + (b A + c A A) y with
    A = y y^T of the smaller side: a s + b s^3 + c s^5 on every singular value s (https://kellerjordan.github.io/posts/muon).
    Each product is rounded to x.dtype. For one matrix bit for bit what torch.optim.Muon computes from bf16.
    """
    check_newton_schulz(x, iterations, eps)
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    y = y / norm.to(y.dtype).clamp(min=eps)
    for _ in range(iterations):
        if y.dim() == 2:
            gram = y @ y.mT
            y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        else:
            stack = y.reshape(-1, *y.shape[-2:])
            gram = stack @ stack.mT
            y = torch.baddbmm(stack, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), stack, beta=a).view(y.shape)
    return y.mT if tall else y


FUNCTIONS: tuple[Callable[..., Any], ...] = (
    rms_norm,
    layer_norm,
    add_rms_norm,
    add_layer_norm,
    rope,
    swiglu,
    grouped_gemm,
    attention,
    cross_entropy,
    linear_cross_entropy,
    adamw,
    grad_norm,
    newton_schulz,
)
