"""Gradients that were computed in the forward: scaled in slabs or at once, and none for what wants none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weftrain.kernels.gradients_in_forward import differentiable_loss


@pytest.mark.parametrize("slab_rows", [None, 3])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_the_backward_scales_what_the_forward_computed(slab_rows: int | None, wanted: tuple[bool, bool]) -> None:
    grad_hidden, grad_weight = torch.rand(2, 4).bfloat16(), torch.rand(7, 4)  # fp32: a sum over chunks

    def compute(*arguments: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert arguments[-2:] == wanted
        return torch.tensor(5.0), grad_hidden, grad_weight

    leaves = [
        torch.zeros(shape, dtype=torch.bfloat16, requires_grad=want)
        for shape, want in zip(((2, 4), (7, 4)), wanted, strict=True)
    ]
    loss = differentiable_loss("test", compute, slab_rows)(
        *leaves, torch.zeros(2, dtype=torch.int64), None, 1.0, -100, 0.0, None, 0.0
    )
    (3 * loss).backward()
    for leaf, want, gradient in zip(leaves, wanted, (grad_hidden, grad_weight), strict=True):
        if want:
            assert torch.equal(leaf.grad, (gradient.float() * 3).bfloat16())  # type: ignore[arg-type]
        else:
            assert leaf.grad is None
