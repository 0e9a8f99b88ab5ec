"""Mixtures of experts over ranks: gradients, losses of routers, biases and metrics are those of one process, however the
model lies over the ranks, and the same bits where that is promised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from float64_reference import state_with
from ranks import LAYOUTS, alone, apart, larger_weights, on_ranks, source_of

from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.parallel import degrees
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.experts_section import ROUTER_MEASURES

Tiny = Callable[..., Recipe]
MORE = ("model.experts.bias_update=0.01", "model.experts.aux_loss=0.5", "model.experts.z_loss=0.1")
BATCH = ("batch.micro_batch_size=1", "batch.global_batch_size=8", "schedule.steps=2")


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("layout", ["ddp", "hsdp", "offload"])
def test_the_same_as_one_process(layout: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("moe", *MORE, *BATCH)
    many, one = on_ranks(recipe, **LAYOUTS[layout]), alone(recipe)
    for run in (many, one):
        run.import_state(state_with(larger_weights(recipe), recipe=recipe))
    batch = source_of(recipe).rows(0, 0, 8)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(batch), one.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert apart(gradients[name], gradient) < 2e-5, name
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert set(ROUTER_MEASURES) <= found.measures.keys()
        for name in ROUTER_MEASURES:
            assert float(found.measures[name]) == pytest.approx(float(expected.measures[name]), abs=2e-5), name
    mine, theirs = many.export_state().tensors, one.export_state().tensors
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith("router.bias"):
            assert torch.equal(mine[name], tensor), name
        elif name.startswith("weights/"):
            assert apart(mine[name], tensor) < 1e-4, name
    many.close()


@pytest.mark.usefixtures("four_ranks")
def test_replayable_bits_are_those_of_one_process(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("moe", *MORE, *BATCH, "precision.numerics=replayable")
    one = alone(recipe)
    wanted = list(one.train(source_of(recipe)))
    state = one.export_state().tensors
    for layout in ("ddp", "fsdp"):
        many = on_ranks(recipe, **LAYOUTS[layout])
        for found, expected in zip(many.train(source_of(recipe)), wanted, strict=True):
            assert torch.equal(found.loss, expected.loss)
            assert torch.equal(found.grad_norm, expected.grad_norm)
            assert all(torch.equal(found.measures[name], expected.measures[name]) for name in ROUTER_MEASURES)
        mine = many.export_state().tensors
        assert all(torch.equal(mine[name], tensor) for name, tensor in state.items())
        many.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_parallel": 2}, "backend.options.tensor_parallel is 2: experts are not cut"),
        ({"context_parallel": 2}, "backend.options.context_parallel is 2: the loss that balances experts is of whole"),
        ({"float8": True}, "backend.options.float8 is true: the products of experts have no float8: set false"),
        ({"compile": True}, "backend.options.compile is true: how many tokens an expert gets is not known"),
    ],
)
def test_what_experts_cannot_have(changes: dict[str, Any], words: str, tiny_recipe: Tiny) -> None:
    with pytest.raises(BackendError, match=r"model\.experts is given and " + words):
        degrees(CudaOptions.model_validate(changes), tiny_recipe("moe"), 4, 4)
