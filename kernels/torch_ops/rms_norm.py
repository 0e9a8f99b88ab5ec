"""rms_norm by torch.nn.functional, given fp32: one kernel when run eagerly on an accelerator, fused with its neighbours
when compiled.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels.arguments import check_rms_norm
from weftrain.kernels.contract import Implementation


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x [..., n], weight [n] -> x.dtype [..., n] (kernels/reference.py). fp32 throughout, rounded once. Saves x in
    fp32.
    """
    check_rms_norm(x, weight)
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


IMPLEMENTATION = Implementation("rms_norm", "torch", rms_norm)
