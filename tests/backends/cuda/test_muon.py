"""Muon over ranks: every matrix moves as in one process, whatever the layout, and a run goes on in another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from float64_reference import state_with
from ranks import LAYOUTS, alone, apart, larger_weights, on_ranks, source_of

from weftrain.core.backend import State
from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]
pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("four_ranks")]
SHAPE = ["model.num_heads=4", "model.intermediate_size=72", "data.sequence_length=12", "model.rotary_dim=4"]
BATCH = ("batch.micro_batch_size=2", "batch.global_batch_size=8", "schedule.steps=2")
MUON = ("optimizer.name=muon", "optimizer.muon={compute: float32}")


@pytest.mark.parametrize("layout", ["fsdp", "hsdp_tensor_2", "ddp", "tensor_2_context_2", "offload"])
def test_the_same_as_one_process(layout: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", *SHAPE, *BATCH, *MUON)
    many, one = on_ranks(recipe, **LAYOUTS[layout]), alone(recipe)
    weights = larger_weights(recipe)
    for run in (many, one):
        run.import_state(state_with(weights, recipe=recipe))
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=2e-5)
    mine, wanted = many.export_state().tensors, one.export_state().tensors
    assert mine.keys() == wanted.keys()
    for spec in recipe.parameters:
        moved = apart(
            mine[f"weights/{spec.name}"] - weights[spec.name], wanted[f"weights/{spec.name}"] - weights[spec.name]
        )
        assert moved < (2e-3 if spec.optimizer == "muon" else 2e-4), spec.name
        assert apart(mine[f"exp_avg/{spec.name}"], wanted[f"exp_avg/{spec.name}"]) < 2e-5, spec.name
    many.close()


def test_a_run_goes_on_in_another_layout_and_in_its_own_with_the_same_bits(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", *SHAPE, *BATCH, *MUON, "precision.numerics=replayable")
    fast = recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"numerics": "fast"})})
    source, whole = source_of(recipe), on_ranks(recipe, **LAYOUTS["ddp"])
    steps = whole.train(source)
    next(steps)
    half = dict(whole.export_state().tensors.items())
    next(steps)
    wanted = dict(whole.export_state().tensors.items())
    whole.close()
    for after, layout, same_bits in ((recipe, "ddp", True), (fast, "hsdp_tensor_2", False)):
        run = on_ranks(after, **LAYOUTS[layout])
        run.import_state(State(1, 1, half))
        assert len(list(run.train(source))) == 1
        found = run.export_state().tensors
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor) if same_bits else apart(found[name], tensor) < 1e-4, name
        run.close()
