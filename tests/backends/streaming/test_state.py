"""State in and out of a store."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from streaming_runs import assert_same, prepare, small, source_of, streaming, trained

from weftrain.backends.common.step_result import result_from_json, result_json
from weftrain.core import checkpoint
from weftrain.core.backend import StepResult
from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]

FILE_TIERS = ("mapped", "direct")


@pytest.mark.parametrize("tier", ["ram", *FILE_TIERS])
def test_evaluation_export_and_gradients_change_nothing(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=3), recipe)[2]
    run = streaming(recipe, tmp_path, tier, 3)
    for result in run.train(source_of(recipe)):
        run.gradients(source_of(recipe).rows(result.step, 0, 4))
        state = run.export_state()
        assert state.step == result.step + 1
    assert_same(run.export_state(), wanted)
    run.close()


def test_a_state_that_is_held_is_read_before_it_changes(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=1), recipe)[2]
    run = streaming(recipe, tmp_path, "direct", 3)
    steps = run.train(source_of(recipe))
    next(steps)
    held = run.export_state()
    list(steps)
    assert_same(held, wanted)
    run.close()


@pytest.mark.parametrize("tier", FILE_TIERS)
def test_state_moves_to_a_checkpoint_and_back(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Store -> checkpoint -> local -> checkpoint -> store, tensor by tensor: the state is the same bits everywhere."""
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path / "first", tier, 2)
    list(run.train(source_of(recipe)))
    written = {
        "recipe": {},
        "dataset_id": "x",
        "fingerprint": {},
        "tokens": 0,
        "position": 0,
        "parent": None,
        "kernels": {},
    }
    one = checkpoint.save(tmp_path / "checkpoints", run.export_state(), **written)
    run.close()
    local = prepare(recipe, steps=3, start=2)
    local.import_state(checkpoint.load(one.path)[0])
    other = streaming(recipe, tmp_path / "second", tier, 3, start=2)
    other.import_state(checkpoint.load(one.path)[0])
    for trainer in (local, other):
        list(trainer.train(source_of(recipe)))
    assert_same(other.export_state(), local.export_state())
    other.close()


def test_a_result_survives_json() -> None:
    result = StepResult(3, torch.tensor(1.5), torch.tensor(float("nan")), {"decay": 0.1}, 8, 6, 2.0, 0.5, skipped=True)
    found = result_from_json(json.loads(json.dumps(result_json(result), allow_nan=False)))
    assert found is not None
    assert (found.step, found.loss, found.learning_rates, found.skipped) == (3, 1.5, {"decay": 0.1}, True)
    assert math.isnan(float(found.grad_norm))
