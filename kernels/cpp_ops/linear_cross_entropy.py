"""linear_cross_entropy for a CPU: products by torch, chunk by chunk; one pass turns bf16 logits into their gradient in
place.

As in torch_ops, the gradients are computed in the *forward* and the backward only scales them. The chunk of logits is
the only large tensor, 2 bytes an element: it is overwritten by its gradient, never widened.
"""

from __future__ import annotations

import ctypes
from typing import Any

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
from weftrain.kernels.derivatives import first_derivatives_only, outside_autocast

_LIBRARY = torch.library.Library("weftrain", "FRAGMENT")
# 2^24 logits of bf16 are 32 MiB: large enough for matrix products at peak (a quarter of that is slower), small beside
# everything else.
_CHUNK_ELEMENTS = 1 << 24
_SLAB_ROWS = 8192


@outside_autocast
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logits_scale: float = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    """hidden bf16 [N, D], weight bf16 [V, D], labels int64 [N] -> fp32 scalar sum of token losses
    (kernels/reference.py).

    Softmax in fp32; dW is summed over chunks in fp32. Saves dhidden [N, D] in bf16 and dW [V, D] in fp32 (one chunk:
    bf16).
    """
    check_linear_cross_entropy(hidden, weight, labels, ignore_index)
    refuse_unless("linear_cross_entropy", hidden.dtype == torch.bfloat16, "bfloat16", hidden)
    return _LossAndGradients.apply(hidden, weight, labels, logits_scale, ignore_index, z_loss)


class _LossAndGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, logits_scale: float, ignore_index: int, z_loss: float
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        loss, grad_hidden, grad_weight = torch.ops.weftrain.cpp_linear_cross_entropy(
            hidden, weight, labels, logits_scale, ignore_index, z_loss, wants_hidden, wants_weight
        )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.wants = wants_hidden, wants_weight
        return loss

    @staticmethod
    @first_derivatives_only("linear_cross_entropy", "cpp")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.wants
        scaled_hidden = (grad_hidden.float() * grad).bfloat16() if wants_hidden else None
        scaled_weight = None
        if wants_weight:
            scaled_weight = torch.empty(grad_weight.shape, dtype=torch.bfloat16, device=grad_weight.device)
            for part in _slabs(grad_weight.shape[0]):
                scaled_weight[part] = grad_weight[part].float() * grad
        return scaled_hidden, scaled_weight, None, None, None, None


def _slabs(vocab: int) -> list[slice]:
    """Rows of the weight that are gone through together, so that a temporary of its gradient is small beside the
    gradient.
    """
    return [slice(first, min(first + _SLAB_ROWS, vocab)) for first in range(0, vocab, _SLAB_ROWS)]


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
    logits_scale: float,
    ignore_index: int,
    z_loss: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), vocab = hidden.shape, weight.shape[0]
    chunks = _chunks(rows, vocab)
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    loss = torch.empty(rows, dtype=torch.float32)
    row_scale = torch.empty((rows, 1), dtype=torch.float32)
    grad_hidden = torch.empty((rows, width) if wants_hidden else 0, dtype=torch.bfloat16)
    grad_weight = _empty_grad_weight(weight, rows, wants_weight)
    if not chunks:
        grad_weight.zero_()
    for index, chunk in enumerate(chunks):
        logits = F.linear(hidden[chunk], weight)
        library().weftrain_softmax_loss(
            pointer(logits), pointer(labels[chunk]), ctypes.c_int64(logits.shape[0]), ctypes.c_int64(vocab),
            ctypes.c_float(logits_scale),
            ctypes.c_int64(ignore_index), ctypes.c_float(z_loss), ctypes.c_int(wants_hidden or wants_weight),
            pointer(loss[chunk]),
            pointer(row_scale[chunk]), threads(),
        )  # fmt: skip
        if wants_hidden:
            grad_hidden[chunk] = (logits @ weight) * row_scale[chunk]
        if wants_weight:
            scaled = (hidden[chunk] * row_scale[chunk]).bfloat16()
            for part in _slabs(vocab):
                partial = logits[:, part].t() @ scaled  # [rows of weight, D]
                if index == 0:
                    grad_weight[part] = partial
                else:
                    grad_weight[part] += partial
    return loss.sum(), grad_hidden, grad_weight


def _empty_grad_weight(weight: Tensor, rows: int, wanted: bool) -> Tensor:
    dtype = torch.float32 if len(_chunks(rows, weight.shape[0])) > 1 else weight.dtype
    return torch.empty(weight.shape if wanted else (0,), dtype=dtype, device=weight.device)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    logits_scale: float,
    ignore_index: int,
    z_loss: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape if wants_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    return loss, grad_hidden, _empty_grad_weight(weight, hidden.shape[0], wants_weight)


_LIBRARY.define(
    "cpp_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, float logits_scale, int ignore_index, float "
    "z_loss,"
    " bool wants_hidden, bool wants_weight) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("cpp_linear_cross_entropy", _loss_and_gradients, "CPU")
_LIBRARY.impl("cpp_linear_cross_entropy", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("weftrain::cpp_linear_cross_entropy", _fake, lib=_LIBRARY)


def _needs(spec: Spec) -> str | None:
    return needs_bfloat16(spec) or unavailable(spec)


IMPLEMENTATION = Implementation("linear_cross_entropy", "cpp", linear_cross_entropy, _needs, version(), files=FILES)
