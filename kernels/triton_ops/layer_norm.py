"""layer_norm: the kernels of `_norm_rows.py`, with a mean and a bias."""

from __future__ import annotations

from torch import Tensor

from weftrain.kernels.arguments import check_layer_norm
from weftrain.kernels.triton_ops._norm_rows import norm_implementation, row_norm

_ROW_NORM = row_norm("layer_norm")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """As kernels/reference.py; statistics and affine map in fp32, rounded once. Deterministic.

    Saves x, weight and bias as they are, and mean and 1 / deviation in fp32, [rows] each.
    """
    check_layer_norm(x, weight, bias)
    return _ROW_NORM(x, None, weight, bias, eps, x.dtype)[0]


IMPLEMENTATION = norm_implementation("layer_norm", layer_norm, centred=True, add=False)
