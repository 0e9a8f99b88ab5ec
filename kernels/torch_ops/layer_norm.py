"""layer_norm by torch.nn.functional in fp32: its bf16 kernel would sum the parameters' gradients in bf16."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import check_layer_norm
from weftrain.kernels.contract import Implementation


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """As kernels/reference.py; fp32 throughout, rounded once. Saves x in fp32."""
    check_layer_norm(x, weight, bias)
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps).to(x.dtype)


IMPLEMENTATION = Implementation("layer_norm", "torch", layer_norm)
