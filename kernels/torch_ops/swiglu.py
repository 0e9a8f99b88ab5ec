"""swiglu: silu and product in fp32, rounded once; a compiled graph makes one pass of it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.registry import Implementation


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., n] -> silu(gate) * up in their dtype (kernels/reference.py). Saves both."""
    return F.silu(gate) * up


IMPLEMENTATION = Implementation("swiglu", "torch", swiglu)
