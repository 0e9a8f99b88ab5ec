"""grouped_gemm by torch's grouped_mm where that takes the call, else group by group into one output.

grouped_mm reads where groups end on the device, so the host waits for nothing. It takes rows of a multiple of 16 bytes,
on a GPU in bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import check_grouped_gemm
from weftrain.kernels.contract import Implementation
from weftrain.kernels.derivatives import outside_autocast
from weftrain.kernels.grouped_products import (
    OUTER_PRODUCTS,
    PRODUCTS,
    differentiable_products,
    empty_outer_products,
    empty_products,
)
from weftrain.kernels.operators import define_operator

_LIBRARY = torch.library.Library("weftrain", "FRAGMENT")


@outside_autocast
def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As kernels/reference.py. Saves x and weight. Each gradient is written into one tensor."""
    check_grouped_gemm(x, weight, ends)
    return _DIFFERENTIABLE(x, weight, ends)


def _products(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """x [N, K], weight [E, K, M], or [E, M, K] where it is to be transposed -> [N, M]."""
    matrices = weight.transpose(1, 2) if transposed else weight
    if _takes(x, weight):
        found: Tensor = F.grouped_mm(x, matrices, offs=ends)
        beyond = torch.arange(len(x), device=x.device) >= ends[-1]  # rows that it leaves as they were allocated
        return found.masked_fill_(beyond[:, None], 0)
    found = x.new_empty(len(x), matrices.shape[2])
    last = ends.tolist()
    for group, (first, end) in enumerate(zip([0, *last], last, strict=False)):
        torch.mm(x[first:end], matrices[group], out=found[first:end])
    found[last[-1] :] = 0
    return found


def _outer_products(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy [N, M], x [N, K] -> [E, M, K]."""
    if _takes(x, dy):
        return F.grouped_mm(dy.t(), x, offs=ends)
    last = ends.tolist()
    found = x.new_empty(len(last), dy.shape[1], x.shape[1])
    for group, (first, end) in enumerate(zip([0, *last], last, strict=False)):
        torch.mm(dy[first:end].t(), x[first:end], out=found[group])
    return found


def _takes(x: Tensor, other: Tensor) -> bool:
    """Whether grouped_mm multiplies them: rows are aligned, and there is a kernel for the dtype."""
    each = 16 // x.element_size()
    sizes = (x.shape[1], *(other.shape[1:]))
    kernel = x.dtype == torch.bfloat16 or (x.device.type == "cpu" and x.dtype == torch.float32)
    return kernel and len(x) > 0 and not any(size % each for size in sizes)


_WHERE = ("CPU", "CUDA")
_DIFFERENTIABLE = differentiable_products(
    "torch",
    define_operator(_LIBRARY, f"grouped_products{PRODUCTS}", dict.fromkeys(_WHERE, _products), empty_products),
    define_operator(
        _LIBRARY,
        f"grouped_outer_products{OUTER_PRODUCTS}",
        dict.fromkeys(_WHERE, _outer_products),
        empty_outer_products,
    ),
)
IMPLEMENTATION = Implementation("grouped_gemm", "torch", grouped_gemm)
