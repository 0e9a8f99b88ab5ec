"""attention for a CPU: each thread takes query heads, packs keys and values once for those that share them, and goes
through blocks of queries.

It is not a flash kernel. The scores of 64 queries against all their keys fit the second-level cache, so softmax is the
plain one and the backward subtracts the row sums of the very probabilities that it multiplies with: where a query sees
one key, its gradient is exactly zero.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_attention
from weftrain.kernels.contract import Implementation, Spec
from weftrain.kernels.cpp_ops._build import (
    FILES,
    library,
    needs_bfloat16,
    pointer,
    refuse_unless,
    strides,
    threads,
    unavailable,
    version,
)
from weftrain.kernels.derivatives import first_derivatives_only, outside_autocast
from weftrain.kernels.operators import define_operator
from weftrain.kernels.visible_keys import first_visible_keys

_LIBRARY = torch.library.Library("weftrain", "FRAGMENT")
_HEAD_DIMS = 16  # the head dimension is a multiple of this


@outside_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention: q bf16 [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D] (kernels/reference.py). D a
    multiple of 16.

    Products of bf16 summed in fp32, scale, mask and softmax in fp32, probabilities rounded to bf16. Saves q, k, v and
    the logsumexp, fp32 [B, H, T]; the backward computes the probabilities again. Keys that no query of a block sees are
    not visited. Deterministic, for any number of threads.
    """
    check_attention(q, k, v, document_start, window)
    refuse_unless(
        "attention",
        q.dtype == torch.bfloat16 and q.shape[-1] % _HEAD_DIMS == 0,
        f"bfloat16 [B, T, H, n x {_HEAD_DIMS}]",
        q,
    )
    reach = q.shape[1] if window is None else min(window, q.shape[1])
    return _Attention.apply(q, k, v, scale, first_visible_keys(q, document_start, window), reach)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, start: Tensor | None, reach: int) -> Tensor:
        output, logsumexp = _FORWARD(q, k, v, scale, start, reach)
        ctx.save_for_backward(q, k, v, start, logsumexp)
        ctx.scale, ctx.reach = scale, reach
        return output

    @staticmethod
    @first_derivatives_only("attention", "cpp")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, start, logsumexp = ctx.saved_tensors
        return *_BACKWARD(grad, q, k, v, logsumexp, ctx.scale, start, ctx.reach), None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """Itself where a head's row is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _sizes(q: Tensor, k: Tensor, reach: int) -> Iterator[ctypes.c_int64]:
    """B, T, H, D, H_kv, and how many keys a query sees at most."""
    return map(ctypes.c_int64, (*q.shape, k.shape[2], reach))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, start: Tensor | None, reach: int) -> tuple[Tensor, Tensor]:
    output, logsumexp = _fake_forward(q, k, v, scale, start, reach)
    q, k, v = _rows(q), _rows(k), _rows(v)
    start = None if start is None else start.contiguous()
    library().weftrain_attention_forward(
        *map(pointer, (q, k, v)), strides(q, k, v), pointer(start), pointer(output), pointer(logsumexp),
        *_sizes(q, k, reach), ctypes.c_float(scale), threads(),
    )  # fmt: skip
    return output, logsumexp


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, start: Tensor | None, reach: int
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(
        (B, H, T), dtype=torch.float32, device=q.device
    )


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, scale: float, start: Tensor | None, reach: int
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _fake_backward(grad, q, k, v, logsumexp, scale, start, reach)
    grad, q, k, v = _rows(grad), _rows(q), _rows(k), _rows(v)
    start = None if start is None else start.contiguous()
    library().weftrain_attention_backward(
        *map(pointer, (grad, q, k, v)), strides(grad, q, k, v), pointer(start), pointer(logsumexp), *map(pointer,
        gradients),
        *_sizes(q, k, reach), ctypes.c_float(scale), threads(),
    )  # fmt: skip
    return gradients


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, scale: float, start: Tensor | None, reach: int
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return first, second, third


_FORWARD = define_operator(
    _LIBRARY,
    "cpp_attention_forward(Tensor q, Tensor k, Tensor v, float scale, Tensor? start, int reach) -> (Tensor, Tensor)",
    {"CPU": _forward},
    _fake_forward,
)
_BACKWARD = define_operator(
    _LIBRARY,
    "cpp_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor logsumexp, float scale, "
    "Tensor? start, int reach) -> (Tensor, Tensor, Tensor)",
    {"CPU": _backward},
    _fake_backward,
)


def _needs(spec: Spec) -> str | None:
    head_dim = int(spec.attributes["head_dim"])
    if head_dim % _HEAD_DIMS:
        return f"needs a head_dim that is a multiple of {_HEAD_DIMS}, this is {head_dim}"
    return needs_bfloat16(spec) or unavailable(spec)


IMPLEMENTATION = Implementation(
    "attention",
    "cpp",
    attention,
    _needs,
    version(),
    files=FILES,
    thresholds={"tokens": 1024},  # from there on fewer queries are taken at a time
)
