"""swiglu as written: a compiled graph makes one pass of it and keeps silu(gate) in fp32 until the product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import check_swiglu
from weftrain.kernels.contract import Implementation


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As kernels/reference.py. Saves gate and up; eagerly also silu(gate)."""
    check_swiglu(gate, up)
    return F.silu(gate) * up


IMPLEMENTATION = Implementation("swiglu", "torch", swiglu)
