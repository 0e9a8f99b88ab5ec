"""Hand-written backward passes refuse second derivatives, and products ignore autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from weftrain.kernels import KernelError
from weftrain.kernels.derivatives import first_derivatives_only, outside_autocast, without_second_derivatives


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @first_derivatives_only("double", "ours")
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.parametrize("function", [_Double.apply, lambda x: without_second_derivatives(2 * x, "double", "ours")])
def test_second_derivatives_are_refused_and_first_ones_given(function: Any) -> None:
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    assert gradient.tolist() == [2, 2, 2]
    with pytest.raises(KernelError, match="double of source 'ours' has no second derivative"):
        torch.autograd.grad(function(x).sum(), x, create_graph=True)


def test_products_are_in_the_dtype_of_the_arguments_under_autocast() -> None:
    def product(x: Tensor, *, weight: Tensor) -> Tensor:
        return x @ weight

    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight=x).dtype == torch.bfloat16
        assert outside_autocast(product)(x, weight=x).dtype == torch.float32
