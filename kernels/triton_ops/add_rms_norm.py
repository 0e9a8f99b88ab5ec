"""add_rms_norm: the kernels of `_norm_rows.py`; the sum is normed while it lies in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_add_rms_norm
from weftrain.kernels.triton_ops._norm_rows import norm_implementation, row_norm

_ROW_NORM = row_norm("add_rms_norm")


def add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As kernels/reference.py; gradients in fp32, rounded once. Deterministic.

    Saves the sum and weight as they are, and 1 / rms in fp32, [rows].
    """
    check_add_rms_norm(residual, branch, weight, dtype)
    normed, total = _ROW_NORM(residual, branch, weight, None, eps, dtype)
    return total, normed


IMPLEMENTATION = norm_implementation("add_rms_norm", add_rms_norm, centred=False, add=True)
