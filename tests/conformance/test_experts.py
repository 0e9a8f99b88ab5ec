"""Mixtures of experts on every backend that has them: gradients with the router's losses in them against float64,
biases and measures over steps, state, and resumes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_cases import FOUND, TRAINERS, Tiny, of, prepare, same_state, weights_of
from float64_reference import initial, reference, relative, state_with
from ranks import source_of

from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.experts_section import ROUTER_MEASURES
from weftrain.core.order.batch import Batch

LOSSES = "model.experts.aux_loss=0.5", "model.experts.z_loss=0.1"


def refused(name: str, recipe: Recipe) -> bool:
    """Whether the backend lacks experts, and then refuses the recipe before step 0."""
    if "experts" not in FOUND[of(name)].unsupported:
        return False
    with pytest.raises(
        BackendError, match=r"model\.experts: the \w+ backend has no mixture of experts: use local, cuda or streaming"
    ):
        prepare(name, recipe)
    return True


@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.08)])
def test_gradients(name: str, compute: str, tolerance: float, tiny_recipe: Tiny) -> None:
    """One micro-batch for two rows, or one for each: the losses of routers do not depend on it."""
    recipe = tiny_recipe("moe", f"precision.compute={compute}", "batch.micro_batch_size=2", *LOSSES)
    if refused(name, recipe):
        return
    run, weights = prepare(name, recipe), initial(recipe, 2.0)
    run.import_state(state_with(weights))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 97, (4, 14)), rng.random((4, 13)) > 0.2
    start = np.where(np.arange(13) < 6, 0, 6).astype(np.int32)[None].repeat(4, 0)
    for batch in (Batch(ids, loss_mask=mask), Batch(ids, document_start=start)):
        loss, gradients = run.gradients(batch)
        wanted_loss, wanted = reference(recipe, weights, batch)
        assert gradients.keys() == wanted.keys()
        errors = {key: relative(gradients[key], wanted[key]) for key in wanted}
        assert max(errors.values()) < tolerance, max(errors.items(), key=lambda item: item[1])
        assert loss == pytest.approx(wanted_loss, rel=tolerance)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_resume_gives_the_same_bits_and_biases_are_part_of_the_state(
    name: str, compute: str, tiny_recipe: Tiny
) -> None:
    more = [f"precision.compute={compute}", "batch.micro_batch_size=2", "model.experts.bias_update=0.01"]
    recipe = tiny_recipe("moe", *more, *LOSSES)
    if refused(name, recipe):
        return
    straight = prepare(name, recipe)
    results = list(straight.train(source_of(recipe)))
    assert all(set(ROUTER_MEASURES) <= result.measures.keys() for result in results)
    assert all(float(result.measures["router_load_max"]) > 1 for result in results)
    assert all(float(result.measures["router_dropped"]) == 0 for result in results)
    first = prepare(name, recipe, steps=2)
    again = [dict(result.measures) for result in first.train(source_of(recipe))]
    state = first.export_state()
    before = {key: tensor.clone() for key, tensor in state.tensors.items()}
    second = prepare(name, recipe, start=2)
    second.import_state(state)
    again += [dict(result.measures) for result in second.train(source_of(recipe))]
    assert [{key: float(value) for key, value in measures.items()} for measures in again] == [
        {key: float(value) for key, value in result.measures.items()} for result in results
    ]
    assert same_state(second.export_state(), straight.export_state())
    list(first.train(source_of(recipe)))
    assert all(torch.equal(state.tensors[key], tensor) for key, tensor in before.items())  # what is exported is a copy
    biases = [tensor for key, tensor in weights_of(straight.export_state()).items() if key.endswith("router.bias")]
    assert biases
    assert all(float(bias.abs().max()) > 0.005 for bias in biases)
    for other in TRAINERS:
        if "experts" not in FOUND[other].unsupported and other != of(name):
            taker = prepare(other, recipe, start=recipe.schedule.steps)
            taker.import_state(straight.export_state())
            assert same_state(taker.export_state(), straight.export_state()), other


def test_a_step_that_is_left_out_moves_no_bias(name: str, tiny_recipe: Tiny) -> None:
    more = ["model.experts.bias_update=0.01", "optimizer.non_finite=skip", "schedule.steps=1"]
    recipe = tiny_recipe("moe", *more)
    if refused(name, recipe):
        return
    run, weights = prepare(name, recipe), initial(recipe)
    weights["final_norm.weight"][0] = torch.inf
    run.import_state(state_with(weights, recipe=recipe))
    before = run.export_state().tensors["weights/layers.1.ffn.router.bias"].clone()
    (result,) = run.train(source_of(recipe))
    assert result.skipped
    assert torch.equal(run.export_state().tensors["weights/layers.1.ffn.router.bias"], before)
