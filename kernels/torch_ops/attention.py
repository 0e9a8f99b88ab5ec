"""attention: blocks of queries on a CPU (source `torch`), and scaled_dot_product_attention for who names it (source
`sdpa`).

The CPU version is not a flash kernel. At training lengths the fused CPU kernel is slower than plain batched matrix
products: a block of queries meets only the prefix of keys that it can see, so half of the square is never computed, and
the products run at the machine's peak. Its backward is written out below, so it is the same with torch.compile and
without.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import check_attention
from weftrain.kernels.contract import Implementation, Spec
from weftrain.kernels.derivatives import first_derivatives_only, outside_autocast

# At [2, 512, 8, 64] in bf16 on two idle cores, compiled, forward + backward: blocks of 64 queries 15.1 ms, 128 10.6 ms,
# 256 11.5 ms, 512 (no causal saving) 14.7 ms; the fused CPU kernel 25.6 ms.
_QUERIES_PER_BLOCK = 128
# Up to this length the probabilities (half of [B, H, T, T], in q.dtype) are kept for the backward; beyond it they are
# computed again.
_KEPT_TOKENS = 1024


@outside_autocast
def attention_blocked(q: Tensor, k: Tensor, v: Tensor, *, scale: float, document_start: Tensor | None = None) -> Tensor:
    """Causal self-attention: q, k, v [B, T, H, D] -> [B, T, H, D] (kernels/reference.py). For a CPU.

    Products in q.dtype, scale, mask and softmax in fp32; dk and dv are summed over query blocks in fp32. Deterministic.
    Saves q, k, v and for T <= 1024 the visible probabilities in q.dtype.
    """
    check_attention(q, k, v, document_start)
    return _Blocked.apply(q, k, v, scale, document_start)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, document_start: Tensor | None) -> Tensor:
        T, H = q.shape[1:3]
        q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)  # [B H, T, D]
        start = None if document_start is None else document_start.repeat_interleave(H, 0)  # [B H, T]
        outputs, kept = [], []
        for block in _blocks(T):
            probabilities = _probabilities(q, k, block, scale, start)
            outputs.append(torch.bmm(probabilities, v[:, : block.stop]))
            if T <= _KEPT_TOKENS:
                kept.append(probabilities)
        ctx.save_for_backward(q, k, v, start, *kept)
        ctx.scale, ctx.heads = scale, H
        return _tokens_first(torch.cat(outputs, 1), H)

    @staticmethod
    @first_derivatives_only("attention", "torch")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, start, *kept = ctx.saved_tensors
        grad = _heads_first(grad)
        grad_q = []
        grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        grad_v = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
        for index, block in enumerate(_blocks(q.shape[1])):
            seen = slice(block.stop)
            probabilities = kept[index] if kept else _probabilities(q, k, block, ctx.scale, start)
            grad_probabilities = torch.bmm(grad[:, block], v[:, seen].transpose(1, 2))
            # Row sums of what was rounded, not of grad * output as flash kernels have it: where a query sees one key,
            # the sum must cancel.
            weighted = probabilities.float() * grad_probabilities
            grad_scores = ((weighted - probabilities * weighted.sum(-1, keepdim=True)) * ctx.scale).to(q.dtype)
            grad_q.append(torch.bmm(grad_scores, k[:, seen]))
            grad_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), q[:, block])
            grad_v[:, seen] += torch.bmm(probabilities.transpose(1, 2), grad[:, block])
        gradients = (torch.cat(grad_q, 1), grad_k.to(k.dtype), grad_v.to(v.dtype))
        return *(_tokens_first(gradient, ctx.heads) for gradient in gradients), None, None


def _blocks(tokens: int) -> list[slice]:
    """Query blocks: at most eight of them, so that a long sequence does not become a long graph."""
    size = max(_QUERIES_PER_BLOCK, -(-tokens // 8))
    # one of no tokens, too
    return [slice(first, min(first + size, tokens)) for first in range(0, max(tokens, 1), size)]


def _probabilities(q: Tensor, k: Tensor, block: slice, scale: float, start: Tensor | None) -> Tensor:
    """softmax of one block of queries over the keys before its end: [B H, queries, block.stop] in q.dtype."""
    scores = torch.bmm(q[:, block], k[:, : block.stop].transpose(1, 2)).float() * scale
    key = torch.arange(block.stop, device=q.device)
    query = torch.arange(block.start, block.stop, device=q.device)
    hidden = key[None, :] > query[:, None]
    if start is not None:
        hidden = hidden | (key < start[:, block, None])
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1).to(q.dtype)


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, H, D] -> contiguous [B H, T, D]."""
    B, T, H, D = x.shape
    return x.transpose(1, 2).reshape(B * H, T, D)


def _tokens_first(x: Tensor, heads: int) -> Tensor:
    """[B H, T, D] -> [B, T, H, D], a view."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


@outside_autocast
def attention_fused(q: Tensor, k: Tensor, v: Tensor, *, scale: float, document_start: Tensor | None = None) -> Tensor:
    """Causal self-attention by scaled_dot_product_attention: q, k, v [B, T, H, D] -> [B, T, H, D]
    (kernels/reference.py).

    With document_start a [B, 1, T, T] mask is built. On CUDA its backward adds dq with float atomics, so bits differ
    from run to run unless torch.use_deterministic_algorithms is set: therefore a source of its own, in no default
    preference. On a CPU torch 2.13's kernel hides an Inf in k and lets a NaN of a later key into earlier queries;
    `kernels bench` times it there, nobody else gets it.
    """
    check_attention(q, k, v, document_start)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, H, T, D]
    if document_start is None:
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        position = torch.arange(q.shape[2], device=q.device)
        visible = (position <= position[:, None]) & (position >= document_start[:, None, :, None])
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    return output.transpose(1, 2)


def _needs_cpu(spec: Spec) -> str | None:
    if spec.device == "cpu":
        return None
    return (
        f"written for a CPU, not for {spec.device}; scaled_dot_product_attention, whose CUDA backward adds with float "
        "atomics, is the "
        "source named sdpa"
    )


def _needs_accelerator(spec: Spec) -> str | None:
    if spec.device != "cpu":
        return None
    return (
        "on a CPU its kernel hides an Inf in k and lets a NaN of a later key into earlier queries, and is slower than "
        "source torch"
    )


IMPLEMENTATION = [
    Implementation("attention", "torch", attention_blocked, _needs_cpu),
    Implementation("attention", "sdpa", attention_fused, _needs_accelerator),
]
