"""What the implementations of newton_schulz share that compute one triangle of its symmetric products and mirror it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of an operator y [S, n, m], contiguous, n <= m, with norms of 1 -> the same after that many iterations
STEPS = "(Tensor y, float a, float b, float c, int iterations) -> Tensor"


def of_norm_one(x: Tensor, eps: float) -> Tensor:
    """x [..., m, n] divided by max(|x|, eps) as in kernels/reference.py: [S, smaller side, larger side], contiguous."""
    y = x.mT if x.shape[-2] > x.shape[-1] else x
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    y = y / norm.to(y.dtype).clamp(min=eps)
    return y.reshape(math.prod(y.shape[:-2]), *y.shape[-2:]).contiguous()


def as_given(y: Tensor, x: Tensor) -> Tensor:
    """y [S, smaller side, larger side] as a view in the shape of x [..., m, n]."""
    return (y.mT if x.shape[-2] > x.shape[-1] else y).reshape(x.shape)


def unwritten_steps(y: Tensor, a: float, b: float, c: float, iterations: int) -> Tensor:
    """What an operator of STEPS returns, uninitialized."""
    return torch.empty_like(y)
