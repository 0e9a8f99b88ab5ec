"""attention: blocks of queries on a CPU (source `torch`), and scaled_dot_product_attention for who names it: with the
kernel that torch picks (source `sdpa`), or with cuDNN's (source `cudnn`).

The CPU version is not a flash kernel. At training lengths the fused CPU kernel is slower than plain batched matrix
products: a block of queries meets only the prefix of keys that it can see, so half of the square is never computed, and
the products run at the machine's peak. Its backward is written out below, so it is the same with torch.compile and
without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from weftrain.kernels.arguments import check_attention
from weftrain.kernels.contract import Implementation, KernelError, Spec
from weftrain.kernels.derivatives import first_derivatives_only, outside_autocast, without_second_derivatives
from weftrain.kernels.visible_keys import first_visible_keys

# At [2, 512, 8, 64] in bf16 on two idle cores, compiled, forward + backward: blocks of 64 queries 15.1 ms, 128 10.6 ms,
# 256 11.5 ms, 512 (no causal saving) 14.7 ms; the fused CPU kernel 25.6 ms.
_QUERIES_PER_BLOCK = 128
# Up to this length the probabilities (half of [B, H, T, T], in q.dtype) are kept for the backward; beyond it they are
# computed again.
_KEPT_TOKENS = 1024


@outside_autocast
def attention_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention: q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D] (kernels/reference.py). For a CPU.

    The query heads of one key head are further rows of its products. Products in q.dtype, scale, mask and softmax in
    fp32; dk and dv are summed over query blocks in fp32. Deterministic. Saves q, k, v and for T <= 1024 the
    probabilities of the keys that a block meets, in q.dtype.
    """
    check_attention(q, k, v, document_start, window)
    return _Blocked.apply(q, k, v, scale, document_start, window)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, document_start: Tensor | None, window: int | None
    ) -> Tensor:
        (T, H), kv_heads = q.shape[1:3], k.shape[2]
        group = max(H // max(kv_heads, 1), 1)
        q, k, v = _heads_first(q, kv_heads), _heads_first(k, kv_heads), _heads_first(v, kv_heads)
        start = None if document_start is None else document_start.repeat_interleave(kv_heads, 0)  # [B H_kv, T]
        outputs, kept = [], []
        for block in _blocks(T, group, window):
            probabilities = _probabilities(q, k, block, scale, start)
            outputs.append(_product(probabilities, v[:, block.keys]))
            if T <= _KEPT_TOKENS:
                kept.append(probabilities)
        ctx.save_for_backward(q, k, v, start, *kept)
        ctx.scale, ctx.kv_heads, ctx.group, ctx.window = scale, kv_heads, group, window
        return _tokens_first(torch.cat(outputs, 1), kv_heads, group)

    @staticmethod
    @first_derivatives_only("attention", "torch")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, start, *kept = ctx.saved_tensors
        grad = _heads_first(grad, ctx.kv_heads)
        grad_q = []
        grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        grad_v = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
        for index, block in enumerate(_blocks(k.shape[1], ctx.group, ctx.window)):
            rows, seen = block.rows, block.keys
            probabilities = kept[index] if kept else _probabilities(q, k, block, ctx.scale, start)
            grad_probabilities = torch.bmm(grad[:, rows], v[:, seen].transpose(1, 2))
            # Row sums of what was rounded, not of grad * output as flash kernels have it: where a query sees one key,
            # the sum must cancel.
            weighted = probabilities.float() * grad_probabilities
            grad_scores = ((weighted - probabilities * weighted.sum(-1, keepdim=True)) * ctx.scale).to(q.dtype)
            grad_q.append(torch.bmm(grad_scores, k[:, seen]))
            grad_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
            grad_v[:, seen] += _product(probabilities.transpose(1, 2), grad[:, rows])
        dk, dv = (_tokens_first(gradient.to(k.dtype), ctx.kv_heads, 1) for gradient in (grad_k, grad_v))
        return _tokens_first(torch.cat(grad_q, 1), ctx.kv_heads, ctx.group), dk, dv, None, None, None


class _Block(NamedTuple):
    """Some queries, their rows (of `group` heads each) and the keys that they meet."""

    queries: slice
    keys: slice
    group: int
    window: int | None

    @property
    def rows(self) -> slice:
        return slice(self.queries.start * self.group, self.queries.stop * self.group)


def _blocks(tokens: int, group: int, window: int | None) -> list[_Block]:
    """At most eight of them (in a window sixteen), so that a long sequence does not become a long graph."""
    size = max(_QUERIES_PER_BLOCK, -(-tokens // (8 if window is None else 16)))
    blocks = []
    for first in range(0, max(tokens, 1), size):  # one of no tokens, too
        past = min(first + size, tokens)
        seen = 0 if window is None else min(max(first - window + 1, 0), past)
        blocks.append(_Block(slice(first, past), slice(seen, past), group, window))
    return blocks


def _probabilities(q: Tensor, k: Tensor, block: _Block, scale: float, start: Tensor | None) -> Tensor:
    """softmax of one block of queries over the keys that it meets: [B H_kv, rows, keys] in q.dtype."""
    scores = _product(q[:, block.rows], k[:, block.keys].transpose(1, 2)).float() * scale
    key = torch.arange(block.keys.start, block.keys.stop, device=q.device)
    query = torch.arange(block.queries.start, block.queries.stop, device=q.device)
    hidden = key[None, :] > query[:, None]
    if block.window is not None:
        hidden = hidden | (key[None, :] <= query[:, None] - block.window)
    if start is not None:
        hidden = hidden | (key < start[:, block.queries, None])
    if block.group > 1:
        hidden = hidden.repeat_interleave(block.group, -2)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1).to(q.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, M, K] @ b [n, K, N], in which a row of `a` that is not finite makes no other row so.

    Processors with products of bf16 pairs (AMX) read the last element of a row of odd length together with the first of
    the next row and multiply that by zero, which is NaN if it is not finite: such rows get another element.
    """
    if a.shape[-1] % 2 and a.dtype == torch.bfloat16:
        a, b = F.pad(a, (0, 1)), F.pad(b, (0, 0, 0, 1))
    return torch.bmm(a, b)


def _heads_first(x: Tensor, kv_heads: int) -> Tensor:
    """[B, T, H, D] -> contiguous [B H_kv, T H / H_kv, D]: of each token the heads of one key head lie together."""
    B, T, H, D = x.shape
    group = H // max(kv_heads, 1)
    return x.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(B * kv_heads, T * group, D)


def _tokens_first(x: Tensor, kv_heads: int, group: int) -> Tensor:
    """The way back: [B H_kv, T group, D] -> [B, T, H_kv group, D]."""
    return x.unflatten(0, (-1, kv_heads)).unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)


@outside_autocast
def attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention by scaled_dot_product_attention: q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]
    (kernels/reference.py).

    With document_start or a window a [B, 1, T, T] mask is built, and nothing is skipped; fewer key heads than query
    heads are then refused, since of torch's kernels only the unfused one takes both, and it repeats keys and values. On
    CUDA its backward adds dq with float atomics, so bits differ
    from run to run unless torch.use_deterministic_algorithms is set: therefore a source of its own, in no default
    preference. On a CPU torch 2.13's kernel hides an Inf in k and lets a NaN of a later key into earlier queries;
    `kernels bench` times it there, nobody else gets it.
    """
    check_attention(q, k, v, document_start, window)
    start = first_visible_keys(q, document_start, window)
    grouped = q.shape[2] != k.shape[2]
    if grouped and start is not None:
        raise KernelError(f"attention: {_NO_MASKED_GROUPS}")
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, H, T, D]
    if start is None:
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        position = torch.arange(q.shape[2], device=q.device)
        visible = (position <= position[:, None]) & (position >= start[:, None, :, None])
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    return output.transpose(1, 2)


@outside_autocast
def attention_cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention by cuDNN through torch: q [B, T, H, D], k and v [B, T, H_kv, D] in bf16 or fp16 ->
    [B, T, H, D] (kernels/reference.py).

    Saves q, k, v, the output and the logsumexp. Not deterministic: torch asks cuDNN for no deterministic backward, and
    refuses this kernel while torch.use_deterministic_algorithms is set. Therefore a source of its own, in no default
    preference. Raises KernelError for documents and windows, for which torch would build a mask of every query and
    key.
    """
    check_attention(q, k, v, document_start, window)
    if document_start is not None or window is not None:
        raise KernelError(f"attention: {_CUDNN_UNMASKED}")
    if _strictly_deterministic():
        raise KernelError(f"attention: {_CUDNN_ATOMIC}")
    if q.shape[1] < 2 or q.numel() == 0:  # cuDNN takes no single key: a query that sees one key gives its value
        output = v.repeat_interleave(q.shape[2] // max(k.shape[2], 1), 2) + 0 * (q.sum() + k.sum())
    else:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, H, T, D]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # and no other: torch raises where cuDNN has no kernel
            output = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)
    return without_second_derivatives(output, "attention", "cudnn")


_CUDNN_UNMASKED = (
    "cuDNN's attention in torch takes documents and windows as a mask of every query and key; use source triton"
)
_CUDNN_ATOMIC = (
    "torch has no deterministic cuDNN attention, and deterministic algorithms are asked for; use source triton or "
    "flash_attn"
)
_CUDNN_MAX_HEAD_DIM = 128  # of training; torch allows 256 on some devices with cuDNN 9.22.1 and newer


def _strictly_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _needs_cudnn(spec: Spec) -> str | None:
    head_dim = int(spec.attributes.get("head_dim", 8))
    if spec.device != "cuda":
        return f"needs an NVIDIA GPU, not {spec.device}"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    if head_dim % 8 or not 8 <= head_dim <= _CUDNN_MAX_HEAD_DIM:
        return f"needs head_dim a multiple of 8 up to {_CUDNN_MAX_HEAD_DIM}, this is {head_dim}"
    if spec.attributes.get("document_start") or spec.attributes.get("window") is not None:
        return _CUDNN_UNMASKED
    if torch.version.hip is not None:
        return "cuDNN is for NVIDIA GPUs, and this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"cuDNN's attention needs sm_80 or newer; this is sm_{major}{minor}"
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or version < _OLDEST_CUDNN:
        found = "none" if version is None else f"{version // 10000}.{version % 10000 // 100}"
        return f"needs cuDNN 9.0 or newer; torch has {found}"
    return _CUDNN_ATOMIC if _strictly_deterministic() else None


_OLDEST_CUDNN = 90000

_NO_MASKED_GROUPS = (
    "with key heads that query heads share, scaled_dot_product_attention takes documents or a window by its unfused "
    "kernel alone, which repeats keys and values; use source triton"
)


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
        masked = spec.attributes.get("document_start") or spec.attributes.get("window") is not None
        return _NO_MASKED_GROUPS if masked and spec.attributes.get("heads_per_key", 1) != 1 else None
    return (
        "on a CPU its kernel hides an Inf in k and lets a NaN of a later key into earlier queries, and is slower than "
        "source torch"
    )


IMPLEMENTATION = [
    Implementation("attention", "torch", attention_blocked, _needs_cpu, thresholds={"tokens": _KEPT_TOKENS}),
    Implementation("attention", "sdpa", attention_fused, _needs_accelerator),
    Implementation("attention", "cudnn", attention_cudnn, _needs_cudnn),
]
