"""What the implementations of grouped_gemm share that have two products of their own: the derivative, and what their
operators return.

The forward and the gradient of x are the same product, by each group's matrix as it lies or transposed; the gradient of
the weight is the product of the transposed incoming gradient and x, over each group's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.derivatives import first_derivatives_only

# Of an operator x [N, K], weight [E, K, M], or [E, M, K] where it is to be transposed -> [N, M]
PRODUCTS = "(Tensor x, Tensor weight, Tensor ends, bool transposed) -> Tensor"
# Of an operator dy [N, M], x [N, K] -> [E, M, K]
OUTER_PRODUCTS = "(Tensor dy, Tensor x, Tensor ends) -> Tensor"


def empty_products(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """What an operator of PRODUCTS returns, uninitialized."""
    return x.new_empty(len(x), weight.shape[1 if transposed else 2])


def empty_outer_products(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """What an operator of OUTER_PRODUCTS returns, uninitialized."""
    return x.new_empty(len(ends), dy.shape[1], x.shape[1])


def differentiable_products(
    source: str, products: Callable[..., Tensor], outer_products: Callable[..., Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of (x [N, K], weight [E, M, K], ends int32 [E]) -> [N, M] by the two operators of `source`, which
    are given contiguous tensors. Saves x and weight; a gradient that is not wanted is not computed.
    """

    class GroupedGemm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
            x, weight, ends = x.contiguous(), weight.contiguous(), ends.contiguous()
            ctx.save_for_backward(x, weight, ends)
            return products(x, weight, ends, True)

        @staticmethod
        @first_derivatives_only("grouped_gemm", source)
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
            x, weight, ends = ctx.saved_tensors
            dy = dy.contiguous()
            dx = products(dy, weight, ends, False) if ctx.needs_input_grad[0] else None
            dweight = outer_products(dy, x, ends) if ctx.needs_input_grad[1] else None
            return dx, dweight, None

    def differentiable(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        found: Tensor = GroupedGemm.apply(x, weight, ends)
        return found

    return differentiable
