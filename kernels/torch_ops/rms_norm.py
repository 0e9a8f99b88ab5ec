"""rms_norm by torch.nn.functional in fp32: one kernel when eager on an accelerator, fused when compiled."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import check_rms_norm
from weftrain.kernels.contract import Implementation


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """As kernels/reference.py; fp32 throughout, rounded once. Saves x in fp32."""
    check_rms_norm(x, weight)
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


IMPLEMENTATION = Implementation("rms_norm", "torch", rms_norm)
