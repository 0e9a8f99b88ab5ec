"""linear_cross_entropy for a CPU: products by torch, chunk by chunk; one pass turns bf16 logits into their gradient in
place.

As in torch_ops, the gradients are computed in the *forward* and the backward only scales them. The chunk of logits is
the only large tensor, 2 bytes an element: it is overwritten by its gradient, never widened.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import check_linear_cross_entropy
from weftrain.kernels.contract import Implementation, Spec
from weftrain.kernels.cpp_ops._build import (
    FILES,
    library,
    needs_bfloat16,
    pointer,
    refuse_unless,
    threads,
    unavailable,
    version,
)
from weftrain.kernels.derivatives import outside_autocast
from weftrain.kernels.gradients_in_forward import SIGNATURE, differentiable_loss, empty_results, slabs
from weftrain.kernels.operators import define_operator

_LIBRARY = torch.library.Library("weftrain", "FRAGMENT")
# 2^24 logits of bf16 are 32 MiB: large enough for matrix products at peak (a quarter of that is slower), small beside
# everything else.
_CHUNK_ELEMENTS = 1 << 24
_SLAB_ROWS = 8192  # rows of the weight whose gradient is computed or scaled together: a small temporary


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
    """hidden bf16 [N, D], weight bf16 [V, D], labels int64 [N] -> fp32 scalar sum of token losses
    (kernels/reference.py).

    Softmax in fp32; dW is summed over chunks in fp32. Saves dhidden [N, D] in bf16 and dW [V, D] in fp32 (one chunk:
    bf16).
    """
    check_linear_cross_entropy(hidden, weight, labels, ignore_index, logits_softcap, label_smoothing, token_weights)
    refuse_unless("linear_cross_entropy", hidden.dtype == torch.bfloat16, "bfloat16", hidden)
    statics = (logits_scale, ignore_index, z_loss, logits_softcap, label_smoothing)
    return _DIFFERENTIABLE(hidden, weight, labels, token_weights, *statics)


def _chunks(rows: int, vocab: int) -> list[slice]:
    """Row slices such that a chunk's logits stay below the limit, at least 64 rows each and as equal as that allows."""
    most = max(64, _CHUNK_ELEMENTS // vocab // 64 * 64)
    size = -(-rows // -(-rows // most)) if rows else 1
    size = -(-size // 64) * 64
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


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
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = hidden.shape[0], weight.shape[0]
    chunks = _chunks(rows, vocab)
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    loss = torch.empty(rows, dtype=torch.float32)
    row_scale = torch.empty((rows, 1), dtype=torch.float32)
    weight_dtype = torch.float32 if len(chunks) > 1 else weight.dtype
    _, grad_hidden, grad_weight = empty_results(hidden, weight, wants_hidden, wants_weight, weight_dtype)
    if token_weights is not None:  # that of an ignored token is not looked at
        token_weights = token_weights.masked_fill(labels == ignore_index, 0.0)
    if not chunks:
        grad_weight.zero_()
    for index, chunk in enumerate(chunks):
        logits = F.linear(hidden[chunk], weight)
        library().weftrain_softmax_loss(
            pointer(logits), pointer(labels[chunk]), ctypes.c_int64(logits.shape[0]), ctypes.c_int64(vocab),
            ctypes.c_float(logits_scale), ctypes.c_float(logits_softcap or 0.0), ctypes.c_int64(ignore_index),
            ctypes.c_float(z_loss), ctypes.c_float(label_smoothing), ctypes.c_int(wants_hidden or wants_weight),
            pointer(loss[chunk]),
            pointer(row_scale[chunk]), threads(),
        )  # fmt: skip
        if token_weights is not None:
            loss[chunk] *= token_weights[chunk]
            row_scale[chunk] *= token_weights[chunk, None]
        if wants_hidden:
            grad_hidden[chunk] = (logits @ weight) * row_scale[chunk]
        if wants_weight:
            scaled = (hidden[chunk] * row_scale[chunk]).bfloat16()
            for part in slabs(vocab, _SLAB_ROWS):
                partial = logits[:, part].t() @ scaled  # [rows of weight, D]
                if index == 0:
                    grad_weight[part] = partial
                else:
                    grad_weight[part] += partial
    return loss.sum(), grad_hidden, grad_weight


def _fake(
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
) -> tuple[Tensor, Tensor, Tensor]:
    weight_dtype = torch.float32 if len(_chunks(hidden.shape[0], weight.shape[0])) > 1 else weight.dtype
    return empty_results(hidden, weight, wants_hidden, wants_weight, weight_dtype)


_LOSS_AND_GRADIENTS = define_operator(
    _LIBRARY, f"cpp_linear_cross_entropy{SIGNATURE}", {"CPU": _loss_and_gradients}, _fake
)
_DIFFERENTIABLE = differentiable_loss("cpp", _LOSS_AND_GRADIENTS, _SLAB_ROWS)


def _needs(spec: Spec) -> str | None:
    return needs_bfloat16(spec) or unavailable(spec)


IMPLEMENTATION = Implementation(
    "linear_cross_entropy",
    "cpp",
    linear_cross_entropy,
    _needs,
    version(),
    files=FILES,
    thresholds={"logits": _CHUNK_ELEMENTS, "vocab_size": _SLAB_ROWS},
)
