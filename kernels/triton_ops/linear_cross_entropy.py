"""linear_cross_entropy, chunked over tokens: a chunk's logits are turned in place into their gradient, and never are
there more.

The gradients are computed in the *forward*, while the chunk's logits are at hand; the backward only multiplies them by
the incoming scalar, in one pass. A chunk is large, since the weight's gradient is a sum over chunks: of several, each
product adds itself to the fp32 sum as it writes its result, where torch can do that, and no pass over [V, D] is made.
The gradient of the logits is rounded to hidden.dtype as the reference rounds it, without factors to stretch its range:
a factor that saves an fp16 probability of 1e-8 overflows an fp16 product of rows with one label.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.arguments import check_linear_cross_entropy
from weftrain.kernels.contract import Compilation
from weftrain.kernels.derivatives import outside_autocast
from weftrain.kernels.gradients_in_forward import SIGNATURE, differentiable_loss, empty_results
from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, compilation, implementation, interpreting, operator
from weftrain.kernels.triton_ops._softmax_rows import (
    LOSS_TYPES,
    LOSSES,
    block_gradient,
    load_logits,
    row_block,
    row_factors,
    row_loss,
    row_statistics,
    smoothing_arguments,
)

# Logits held at once: 8,384 rows of 32000, 512 MiB in bf16. A further chunk costs 8 bytes an element of the weight,
# beside 6 flops for each of its rows: of so many rows 3 % of the products' time on an H200.
CHUNK_ELEMENTS = 1 << 28
_ROW_MULTIPLE = 64
_SCALE_BLOCK, _SCALE_WARPS = 4096, 8
# Products of bf16 or fp16 with an fp32 sum, on CUDA, came with torch 2.8.
_FP32_SUMS = "dtype_out" in torch.ops.aten.addmm.overloads()


@triton.jit
def _loss_and_gradient(
    logits, labels, token_weights, loss, columns, scale, cap, z_loss, smoothing, uniform, ignore_index,
    GRADIENT: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of contiguous logits: its loss, and where wanted d loss / d logits in the place of the logits.

    token_weights; smoothing and uniform, its share of each column: None where there are none.
    """
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * columns
    label = tl.load(labels + row)
    maximum, total, below = row_statistics(x, columns, scale, cap, smoothing, CAPPED, BLOCK)
    weight = tl.load(token_weights + row) if token_weights is not None else None
    tl.store(
        loss + row,
        row_loss(
            x,
            label,
            weight,
            columns,
            scale,
            cap,
            z_loss,
            smoothing,
            uniform,
            ignore_index,
            maximum,
            total,
            below,
            CAPPED,
        ),
    )
    if GRADIENT:
        softmax_factor, label_factor, z_factor = row_factors(
            label, columns, scale, z_loss, ignore_index, maximum, total, 1.0 if weight is None else weight
        )
        uniform_factor = None
        if smoothing is not None:
            uniform_factor = label_factor * uniform
            label_factor = label_factor * (1.0 - smoothing)
        tl.debug_barrier()  # every warp has read the logit at the label before any writes there
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            values = load_logits(x, column, inside, scale, cap, CAPPED)
            gradient = block_gradient(
                values, column, label, cap, maximum, softmax_factor, label_factor, z_factor, uniform_factor, CAPPED
            )
            tl.store(x + column, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _scale(gradient, factor, scaled, elements, BLOCK: tl.constexpr):
    """scaled = gradient * factor, in fp32, rounded once."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(gradient + offset, mask=offset < elements, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(scaled + offset, values.to(scaled.dtype.element_ty), mask=offset < elements)


def _launch_scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    scaled, elements = _fake_scale(gradient, factor, dtype), gradient.numel()
    if elements:
        grid = (triton.cdiv(elements, _SCALE_BLOCK),)
        _scale[grid](gradient, factor, scaled, elements, BLOCK=_SCALE_BLOCK, num_warps=_SCALE_WARPS)
    return scaled


def _fake_scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)


def _sum_of_products(sums: Tensor, first: bool, left: Tensor, right: Tensor) -> None:
    """sums (fp32) = left right, or of another chunk than the first += left right."""
    if left.dtype == torch.float32:
        torch.addmm(sums, left, right, beta=0 if first else 1, out=sums)
    elif _FP32_SUMS and left.is_cuda and first:
        torch.mm(left, right, out_dtype=torch.float32, out=sums)
    elif _FP32_SUMS and left.is_cuda:
        torch.addmm(sums, left, right, out_dtype=torch.float32, out=sums)
    elif first:
        sums.copy_(torch.mm(left, right))
    else:
        sums += torch.mm(left, right)


def _launch(
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
    """(loss sum, d hidden, d weight); a gradient that is not wanted has no elements."""
    (rows, _), columns = hidden.shape, weight.shape[0]
    _, grad_hidden, grad_weight = empty_results(hidden, weight, wants_hidden, wants_weight, weight.dtype)
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    size = max(_ROW_MULTIPLE, CHUNK_ELEMENTS // columns // _ROW_MULTIPLE * _ROW_MULTIPLE)
    buffer = torch.empty((min(size, rows), columns), dtype=hidden.dtype, device=hidden.device)
    sums = grad_weight  # of one chunk; of several chunks in fp32
    if wants_weight and rows > size and weight.dtype != torch.float32:
        sums = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    block, warps = row_block(columns, logits_softcap is not None)
    if rows == 0:
        grad_weight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):  # the products are in hidden.dtype, whatever surrounds them
        for first in range(0, rows, size):
            chunk, chunk_losses = hidden[first : first + size], losses[first : first + size]
            logits = torch.mm(chunk, weight.t(), out=buffer[: chunk.shape[0]])  # [n, D] x [D, V] -> [n, V]
            _loss_and_gradient[(chunk.shape[0],)](
                logits, labels[first : first + size],
                None if token_weights is None else token_weights[first : first + size],
                chunk_losses, columns, logits_scale, logits_softcap or 1.0,
                z_loss, *smoothing_arguments(label_smoothing, columns), ignore_index,
                GRADIENT=wants_hidden or wants_weight, CAPPED=logits_softcap is not None,
                BLOCK=block, num_warps=warps,
            )  # fmt: skip
            if wants_hidden:
                torch.mm(logits, weight, out=grad_hidden[first : first + size])
            if wants_weight and rows <= size:
                torch.mm(logits.t(), chunk, out=grad_weight)
            elif wants_weight:
                _sum_of_products(sums, first == 0, logits.t(), chunk)
    if sums is not grad_weight:
        grad_weight.copy_(sums)
    return losses.sum(), grad_hidden, grad_weight


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
    return empty_results(hidden, weight, wants_hidden, wants_weight, weight.dtype)


_LOSS_AND_GRADIENTS = operator(f"linear_cross_entropy_forward{SIGNATURE}", _launch, _fake)
_SCALE = operator(
    "linear_cross_entropy_scale(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor", _launch_scale, _fake_scale
)
_DIFFERENTIABLE = differentiable_loss("triton", _LOSS_AND_GRADIENTS, scaled=_SCALE)


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

    Products in hidden.dtype, softmax in fp32; dW is summed over chunks in fp32. Where a gradient is wanted it is
    computed here, and saved: dhidden [N, D] and dW [V, D], in the inputs' dtype. Peak beyond that: one chunk of logits
    (at most 512 MiB in bf16, or 64 rows), with several chunks also dW in fp32. A label outside 0..V-1 that is not
    ignored makes the loss NaN. Raises KernelError.
    """
    check_linear_cross_entropy(hidden, weight, labels, ignore_index, logits_softcap, label_smoothing, token_weights)
    statics = (float(logits_scale), ignore_index, float(z_loss), logits_softcap, float(label_smoothing))
    token_weights = None if token_weights is None else token_weights.contiguous()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _DIFFERENTIABLE(hidden, weight, labels.contiguous(), token_weights, *statics)
    return _LOSS_AND_GRADIENTS(hidden, weight, labels.contiguous(), token_weights, *statics, False, False)[0]


def _compilations() -> list[Compilation]:
    found = []
    for dtype, width, size, capped, absent in LOSSES:
        block, warps = row_block(32000, capped)
        types = {"logits": f"*{dtype}:16", "loss": "*fp32:16", "columns": size, **LOSS_TYPES}
        for gradient in (False, True):
            constants = {"GRADIENT": gradient, "CAPPED": capped, "BLOCK": block, **absent}
            name = f"{'loss and gradient' if gradient else 'loss'} {dtype} {width}"
            found.append(compilation(name, _loss_and_gradient, types, constants, warps))
    for dtype in TRITON_DTYPES.values():
        types = {"gradient": f"*{dtype}:16", "factor": "*fp32", "scaled": f"*{dtype}:16", "elements": "i32:16"}
        found.append(compilation(f"scale {dtype}", _scale, types, {"BLOCK": _SCALE_BLOCK}, _SCALE_WARPS))
    return found


IMPLEMENTATION = implementation(
    "linear_cross_entropy",
    linear_cross_entropy,
    _compilations,
    thresholds={} if interpreting() else {"logits": CHUNK_ELEMENTS},  # so many take the interpreter an hour
)
