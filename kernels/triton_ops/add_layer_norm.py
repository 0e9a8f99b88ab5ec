"""add_layer_norm: the kernels of `_norm_rows.py`; the sum is normed while it lies in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_add_layer_norm
from weftrain.kernels.triton_ops._norm_rows import norm_implementation, row_norm

_ROW_NORM = row_norm("add_layer_norm")


def add_layer_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As kernels/reference.py; gradients in fp32, rounded once. Deterministic.

    Saves the sum, weight and bias as they are, and mean and 1 / deviation in fp32, [rows] each.
    """
    check_add_layer_norm(residual, branch, weight, bias, dtype)
    normed, total = _ROW_NORM(residual, branch, weight, bias, eps, dtype)
    return total, normed


IMPLEMENTATION = norm_implementation("add_layer_norm", add_layer_norm, centred=True, add=True)
