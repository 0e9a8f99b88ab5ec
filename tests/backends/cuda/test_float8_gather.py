"""Weights that ranks gather in eight bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from eight_bits import SIZES
from ranks import larger_weights, on_ranks, source_of, started

from weftrain.core.config import Recipe

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'weftrain[float8]'")


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("options", [{}, {"parallel": "hsdp", "shard_group": 2}], ids=["fsdp", "hsdp"])
def test_weights_that_are_gathered_in_float8(options: dict[str, Any], tiny_recipe: Callable[..., Recipe]) -> None:
    """The same bits as of weights that are gathered in fp32 and rounded then: the scale is that of the whole tensor, and
    follows the weights from step to step, and those of a state that is imported. What is saved is fp32 and whole.
    """
    wanted = ["batch.global_batch_size=8", "batch.micro_batch_size=2", "schedule.steps=3", "precision.compute=float32"]
    recipe = tiny_recipe("amber", *SIZES, *wanted, "schedule.learning_rate=[{shape: constant, steps: 9, start: 1e-3}]")
    weights = larger_weights(recipe)
    found: list[tuple[list[float], float, dict[str, torch.Tensor]]] = []
    for gather in (True, False):
        run = on_ranks(recipe, weights, float8="tensorwise", float8_gather=gather, **options)
        losses = [float(result.loss) for result in run.train(source_of(recipe))]
        tensors = run.export_state().tensors
        trained = {name: tensors[f"weights/{name}"].clone() for name in weights}
        state = started(recipe)
        run.import_state(replace(state, tensors={name: 3 * tensor for name, tensor in state.tensors.items()}))
        imported, _ = run.gradients(source_of(recipe).rows(0, 0, 8))
        found.append((losses, imported, trained))
        run.close()
    (losses, imported, gathered), (plain_losses, plain_imported, plain) = found
    assert losses == plain_losses
    assert imported == plain_imported
    assert losses[2] < losses[1] < losses[0]
    for name in weights:
        assert gathered[name].dtype == torch.float32
        assert torch.equal(gathered[name], plain[name]), name
