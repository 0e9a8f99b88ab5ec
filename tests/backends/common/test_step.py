"""The arithmetic of a step, against torch's own and against numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from weftrain.backends.common.step import (
    LossScale,
    clip_coefficient,
    global_norm,
    padded_rows,
    present,
    step_happens,
    to_device,
)
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.order.batch import Batch
from weftrain.core.order.synthetic import synthetic_source

NAN, ONE = torch.tensor(math.nan), torch.tensor(1.0)


def test_a_step_with_numbers_that_are_not_finite_happens_nowhere(tiny_recipe: Callable[..., Recipe]) -> None:
    halting, skipping = tiny_recipe(), tiny_recipe("crystal", "optimizer.non_finite=skip")
    source = synthetic_source(97, 13, 12, 4, seed=5)

    def never() -> list[torch.Tensor]:
        raise AssertionError("the losses are asked for, which may be a collective, though nothing is reported")

    assert step_happens(halting, source, 0, ONE, ONE, 52, never)
    assert not step_happens(skipping, source, 0, ONE, NAN, 52, never)
    with pytest.raises(
        NonFiniteError, match=r"step 1: loss not finite, gradient norm 1.0: .*samples: synthetic:6, synthetic:7;"
    ):
        step_happens(halting, source, 1, NAN, ONE, 52, lambda: [ONE, NAN])
    with pytest.raises(NonFiniteError, match=r"step 0: loss 2.0, gradient norm nan: .*synthetic:0, .*synthetic:3;"):
        step_happens(halting, source, 0, ONE, NAN, 52, lambda: [ONE, ONE])
    with pytest.raises(NonFiniteError, match="no token of the global batch bears a loss"):
        step_happens(halting, source, 0, NAN, ONE, 0, lambda: [NAN])


def test_norm_and_clipping_are_torchs() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    gradients = [torch.tensor([3.0, 0.0, 1.0]), torch.tensor([0.5, 4.0, -2.0])]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    wanted = torch.nn.utils.clip_grad_norm_(parameters, 0.7)
    norm = global_norm([gradient.norm() for gradient in gradients])
    assert torch.equal(norm, wanted)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient * clip_coefficient(norm, 0.7))
    assert clip_coefficient(norm, None) == clip_coefficient(norm, 100.0) == 1.0


def test_the_mean_loss_is_over_bearing_tokens() -> None:
    assert LossScale(10, 4).mean(2.0) == 5.0
    assert LossScale(4, 4).mean(2.0) == 2.0
    assert math.isnan(LossScale(10, 0).mean(0.0))


def test_padded_rows_bear_no_loss() -> None:
    class HeldOut:
        name, sequence_length, num_rows, dataset_id = "held", 2, 5, "x"

        def rows(self, first: int, count: int) -> Batch:
            return Batch(np.arange(15).reshape(5, 3)[first : first + count])

    batch = padded_rows(HeldOut(), 4, 2)
    labels = to_device(batch, torch.device("cpu")).labels
    assert labels.tolist() == [[13, 14], [-100, -100]]


def test_a_gradient_that_is_missing_is_an_error() -> None:
    with pytest.raises(BackendError, match="no gradient reached b "):
        present({"a": ONE, "b": None}, ["a", "b"])
