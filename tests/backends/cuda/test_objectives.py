"""Objectives on ranks that share rows: a row's log-probability is the sum of what several ranks have of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ranks import alone, apart, larger_weights, on_ranks, source_of, started

from weftrain.core.backend import State
from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]
SHAPE = ["model.num_heads=4", "model.intermediate_size=72", "data.sequence_length=12", "model.rotary_dim=4"]
DPO = "{name: dpo, beta: 0.3, label_smoothing: 0.1, length_normalized: true, reference: base}"


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (DPO, {"tensor_parallel": 2, "context_parallel": 2}),
        (DPO, {"tensor_parallel": 2}),
        pytest.param(DPO, {"parallel": "ddp"}, marks=pytest.mark.prove),
        pytest.param(DPO, {"parallel": "hsdp", "shard_group": 1, "context_parallel": 2}, marks=pytest.mark.prove),
        ("{z_loss: 0.01, label_smoothing: 0.1, token_weights: true}", {"tensor_parallel": 2, "context_parallel": 2}),
    ],
)
def test_the_same_as_one_process(objective: str, options: dict[str, Any], tiny_recipe: Tiny) -> None:
    batch = ("batch.micro_batch_size=2", "batch.global_batch_size=8", "schedule.steps=2")
    recipe = tiny_recipe("amber", "name=pairs", *SHAPE, *batch, f"objective={objective}")
    many, one = on_ranks(recipe, **options), alone(recipe)
    for run in (many, one):
        run.import_state(started(recipe))
    rows = source_of(recipe).rows(0, 0, 8)
    loss, gradients = many.gradients(rows)
    wanted_loss, wanted = one.gradients(rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert max(apart(gradients[name], gradient) for name, gradient in wanted.items()) < 2e-5
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        wanted_measures = {name: float(value) for name, value in expected.measures.items()}
        assert {name: float(value) for name, value in found.measures.items()} == pytest.approx(
            wanted_measures, rel=1e-4
        )
    many.close()


RANDOM_MATCHING = "{name: random_matching, forget: [any], forget_weight: 0.7}"
RMU = "{name: rmu, forget: [any], layer: 0, steering: 2.0, retain_weight: 3.0}"
FOUR_OF_A_ROW = {"tensor_parallel": 2, "context_parallel": 2}
HYBRID = {"parallel": "hsdp", "shard_group": 2}


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (RMU, FOUR_OF_A_ROW),
        pytest.param(RANDOM_MATCHING, FOUR_OF_A_ROW, marks=pytest.mark.prove),
        pytest.param(RMU, {"parallel": "ddp"}, marks=pytest.mark.prove),
        pytest.param(RANDOM_MATCHING, {"parallel": "ddp"}, marks=pytest.mark.prove),
        pytest.param(RMU, HYBRID, marks=pytest.mark.prove),
        pytest.param(RANDOM_MATCHING, HYBRID, marks=pytest.mark.prove),
        pytest.param(RMU, {"cpu_offload": True, "activation_checkpointing": "full"}, marks=pytest.mark.prove),
    ],
)
def test_losses_of_states_are_of_each_ranks_own_tokens(
    objective: str, options: dict[str, Any], tiny_recipe: Tiny
) -> None:
    batch = ("batch.micro_batch_size=2", "batch.global_batch_size=8", "schedule.steps=2")
    recipe = tiny_recipe("amber", "name=pairs", *SHAPE, *batch, f"objective={objective}")
    many, one = on_ranks(recipe, **options), alone(recipe)
    state = many.export_state()
    weights = {f"weights/{name}": weight for name, weight in larger_weights(recipe).items()}
    moved = State(0, 0, {name: weights.get(name, tensor) for name, tensor in state.tensors.items()})
    for run in (many, one):
        run.import_state(moved)  # what rmu keeps is the model from before
    rows = replace(source_of(recipe).rows(0, 0, 8), forget=np.arange(8) % 3 == 0, token_weights=None, reference=None)
    loss, gradients = many.gradients(rows)
    wanted_loss, wanted = one.gradients(rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    assert max(apart(gradients[name], gradient) for name, gradient in wanted.items()) < 2e-5
    many.close()
