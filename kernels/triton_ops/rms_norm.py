"""rms_norm: the kernels of `_norm_rows.py`, without a mean."""

from __future__ import annotations

from torch import Tensor

from weftrain.kernels.arguments import check_rms_norm
from weftrain.kernels.triton_ops._norm_rows import norm_implementation, row_norm

_ROW_NORM = row_norm("rms_norm")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """As kernels/reference.py; fp32 throughout, rounded once. Deterministic.

    Saves x and weight as they are, and 1 / rms in fp32, [rows].
    """
    check_rms_norm(x, weight)
    return _ROW_NORM(x, None, weight, None, eps, x.dtype)[0]


IMPLEMENTATION = norm_implementation("rms_norm", rms_norm, centred=False, add=False)
