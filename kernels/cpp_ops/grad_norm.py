"""grad_norm: sums of squares in blocks of 16,384 elements, blocks added in double and in order.

The bits do not depend on the number of threads, unlike those of torch.linalg.vector_norm.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_grad_norm
from weftrain.kernels.contract import Implementation
from weftrain.kernels.cpp_ops._build import FILES, library, pointer, refuse_unless, threads, unavailable, version


@torch.no_grad()
def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Global L2 norm, 0-dim fp32 (kernels/reference.py). Deterministic, for any number of threads."""
    check_grad_norm(gradients)
    refuse_unless("grad_norm", True, "gradients", gradients[0])
    loaded = library()
    block = loaded.weftrain_block()
    total = 0.0
    for gradient in gradients:
        dense = (gradient.float() if gradient.dtype == torch.float16 else gradient).contiguous()
        partial = torch.empty(-(-dense.numel() // block), dtype=torch.float64)
        dtype = ctypes.c_int(dense.dtype == torch.bfloat16)
        total += loaded.weftrain_sum_of_squares(
            pointer(dense), dtype, ctypes.c_int64(dense.numel()), pointer(partial), threads()
        )
    return torch.tensor(total, dtype=torch.float64).sqrt().float()


IMPLEMENTATION = Implementation(
    "grad_norm", "cpp", grad_norm, unavailable, version(), files=FILES, thresholds={"elements": 1 << 14}
)
