"""add_rms_norm by torch.nn.functional in fp32: the sum and its norm are one pass where they are compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import check_add_rms_norm
from weftrain.kernels.contract import Implementation


def add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As kernels/reference.py. Saves the sum in fp32."""
    check_add_rms_norm(residual, branch, weight, dtype)
    total = residual + branch
    return total, F.rms_norm(total.float(), (total.shape[-1],), weight.float(), eps).to(dtype)


IMPLEMENTATION = Implementation("add_rms_norm", "torch", add_rms_norm)
