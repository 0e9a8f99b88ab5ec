"""Objective dpo on the local backend, compiled and in bf16, against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from float64_reference import initial, objective_reference, relative, state_with
from ranks import source_of
from torch._dynamo.utils import counters

from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan, Run
from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]
PAIRS = ["name=pairs", "batch.global_batch_size=8", "batch.micro_batch_size=4"]
DPO = "objective={name: dpo, beta: 0.3, label_smoothing: 0.1, reference: base}"
IPO = "objective={name: dpo, beta: 0.5, form: ipo, length_normalized: true, reference: base}"


def prepare(recipe: Recipe) -> Run:
    backend = get_backend("local")
    options = backend.options.model_validate({"device": "cpu", "threads": 1, **recipe.backend.options})
    return backend.prepare(Job(recipe, Plan(0, 1), options))


def assert_near_float64(recipe: Recipe, tolerance: float) -> None:
    """Gradients, loss and measures; accuracy is a count and equal."""
    run, weights, source = prepare(recipe), initial(recipe, 2.0), source_of(recipe)
    run.import_state(state_with(weights))
    wanted_loss, wanted, measures = objective_reference(recipe, weights, source.rows(0, 0, 8))
    loss, gradients = run.gradients(source.rows(0, 0, 8))
    assert loss == pytest.approx(wanted_loss, rel=tolerance)
    for name, gradient in wanted.items():
        if not name.endswith("k_proj.bias"):  # zero but for rotation
            assert relative(gradients[name], gradient) < tolerance, name
    (result,) = run.train(source)
    found = {name: float(value) for name, value in result.measures.items()}
    assert found == pytest.approx(measures, rel=tolerance, abs=tolerance)
    assert found["reward_accuracy"] == measures["reward_accuracy"]


@pytest.mark.parametrize("objective", [DPO, IPO])
def test_in_bf16(objective: str, tiny_recipe: Tiny) -> None:
    """The sums of a row's log-probabilities and what follows from them are no bf16: errors are those of the products."""
    assert_near_float64(tiny_recipe("amber", *PAIRS, objective, "precision.compute=bfloat16"), 3e-2)


@pytest.mark.prove
def test_compiled(tiny_recipe: Tiny) -> None:
    assert_near_float64(tiny_recipe("crystal", *PAIRS, DPO, "backend.options.compile=true"), 2e-5)


@pytest.mark.prove
def test_compiled_head_is_one_graph(tiny_recipe: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block and of the head one each, whatever the numbers of bearing tokens are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    recipe = tiny_recipe("crystal", *PAIRS, DPO, "backend.options.compile=true")
    run, source = prepare(recipe), source_of(recipe)
    for step in range(3):
        run.gradients(source.rows(step, 0, 8))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
