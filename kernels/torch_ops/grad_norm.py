"""grad_norm in one generated pass a tensor, summed in rows of 4096: faster than torch's norm of bf16, and nearer the
truth.

`torch.linalg.vector_norm` in fp32 adds millions of squares into one accumulator a vector lane, and is off by 4e-4 for
16 M elements; this is off by 4e-8, and therefore *not* bit for bit the norm of torch.nn.utils.clip_grad_norm_.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_grad_norm
from weftrain.kernels.contract import Implementation
from weftrain.kernels.torch_ops._generated import needs_compiler

_ROW = 4096


@torch.no_grad()
def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Global L2 norm, 0-dim fp32 (kernels/reference.py). Deterministic for a given number of threads."""
    check_grad_norm(gradients)
    sum_of_squares = _compiled_sum_of_squares()
    norms = []
    for gradient in gradients:
        flat = gradient.reshape(-1)
        rows = flat.shape[0] // _ROW
        if rows < 2:  # torch.compile would treat the sizes 0 and 1 as constants
            rows = 0
        else:
            norms.append(sum_of_squares(flat[: rows * _ROW].view(rows, _ROW).detach()).sqrt())
        if rows * _ROW < flat.shape[0]:
            norms.append(torch.linalg.vector_norm(flat[rows * _ROW :], dtype=torch.float32))
    if not norms:  # every tensor is empty
        return torch.zeros((), dtype=torch.float32, device=gradients[0].device)
    return torch.linalg.vector_norm(torch.stack(norms))


@functools.cache
def _compiled_sum_of_squares() -> Callable[[Tensor], Tensor]:
    return torch.compile(_sum_of_squares, dynamic=True, fullgraph=True)


def _sum_of_squares(rows: Tensor) -> Tensor:
    """[R, 4096] -> 0-dim fp32: within each row first, then over the rows."""
    return rows.float().square().sum(1).sum()


IMPLEMENTATION = Implementation("grad_norm", "torch", grad_norm, needs_compiler, thresholds={"elements": 2 * _ROW})
