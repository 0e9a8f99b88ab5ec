"""Partial training on every backend that has it: frozen parameters against the float64 reference, in steps, in state
and across resumes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conformance_cases import FOUND, TRAINERS, Tiny, of, prepare, same_state, weights_of
from float64_reference import initial, reference, relative, state_with
from ranks import source_of

from weftrain.analysis.evaluation.generation import load_model
from weftrain.core.checkpoint import Weights
from weftrain.core.config import Recipe
from weftrain.core.dropout import row_keys
from weftrain.core.errors import BackendError, CheckpointError
from weftrain.core.order.batch import Batch

# what is frozen: the first and the last things that are computed, whole blocks, parts of blocks, and all norms
FREEZE = ["[embedding, layers.0]", "[layers.1, final_norm, '*.bias']", "['*_norm', layers.*.ffn.up_proj]"]


def refused(name: str, recipe: Recipe, *features: str) -> bool:
    """Whether the backend lacks what the recipe asks for, which it then refuses before step 0."""
    if not FOUND[of(name)].unsupported & set(features):
        return False
    with pytest.raises(BackendError, match=r"tuning\."):
        prepare(name, recipe)
    return True


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "freeze"), [("crystal", FREEZE[0]), ("llama", FREEZE[1]), ("crystal", FREEZE[2])])
def test_frozen_parameters_have_no_gradient_and_the_others_that_of_the_reference(
    name: str, family: str, compute: str, freeze: str, tiny_recipe: Tiny
) -> None:
    if family == "llama":
        freeze = freeze.replace(", '*.bias'", "")
    recipe = tiny_recipe(family, f"tuning.freeze={freeze}", f"precision.compute={compute}", "batch.micro_batch_size=2")
    if refused(name, recipe, "freeze"):
        return
    run, weights = prepare(name, recipe), initial(recipe, 2.0)
    run.import_state(state_with(weights, recipe=recipe))
    batch = Batch(np.random.default_rng(0).integers(0, 97, (4, 14)))
    loss, gradients = run.gradients(batch)
    wanted_loss, wanted = reference(recipe, weights, batch)
    tolerance = 2e-5 if compute == "float32" else 0.06
    assert gradients.keys() == wanted.keys() == {spec.name for spec in recipe.parameters if spec.trained}
    assert loss == pytest.approx(wanted_loss, rel=tolerance)
    errors = {key: relative(gradients[key], wanted[key]) for key in wanted if not key.endswith("k_proj.bias")}
    assert max(errors.values()) < tolerance, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize(("compute", "freeze"), [("float32", FREEZE[0]), ("bfloat16", FREEZE[1])])
def test_frozen_weights_keep_every_bit_over_steps_state_and_resume(
    name: str, compute: str, freeze: str, tiny_recipe: Tiny
) -> None:
    """Whether or not bf16 can hold them; and the norm that is clipped is that of the trained ones."""
    more = [f"precision.compute={compute}", "batch.micro_batch_size=2", "schedule.steps=4"]
    recipe = tiny_recipe("crystal", f"tuning.freeze={freeze}", *more)
    if refused(name, recipe, "freeze"):
        return
    weights = initial(recipe, 2.0)
    weights["layers.1.ffn.up_proj.weight"] = weights["layers.1.ffn.up_proj.weight"].bfloat16().float()
    straight = prepare(name, recipe)
    straight.import_state(state_with(weights, recipe=recipe))
    results = list(straight.train(source_of(recipe)))
    _, wanted = reference(recipe, weights, source_of(recipe).rows(0, 0, 4))
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    assert float(results[0].grad_norm) == pytest.approx(norm, rel=2e-5 if compute == "float32" else 0.06)
    state = straight.export_state()
    frozen = [spec.name for spec in recipe.parameters if not spec.trained]
    assert not {key.partition("/")[2] for key in state.tensors if not key.startswith("weights/")} & set(frozen)
    found = weights_of(state)
    assert all(torch.equal(found[key], weights[key]) for key in frozen)
    assert all(not torch.equal(found[key], weights[key]) for key in wanted if not key.endswith("k_proj.bias"))

    first = prepare(name, recipe, steps=2)
    first.import_state(state_with(weights, recipe=recipe))
    list(first.train(source_of(recipe)))
    second = prepare(name, recipe, start=2)
    second.import_state(first.export_state())
    list(second.train(source_of(recipe)))
    assert same_state(second.export_state(), state)
    for other in TRAINERS:
        if "freeze" not in FOUND[other].unsupported and other != of(name):
            taker = prepare(other, recipe, start=4)
            taker.import_state(state)
            assert same_state(taker.export_state(), state), other


LORA = "tuning.lora={rank: 3, alpha: 6, dropout: %s, targets: [layers.*.attention.*_proj, layers.1.ffn.*]}"


@pytest.mark.parametrize(("compute", "dropout"), [("float32", "0.0"), ("float32", "0.3"), ("bfloat16", "0.0")])
def test_adapters_have_the_gradient_of_the_reference_and_train_alone(
    name: str, compute: str, dropout: str, tiny_recipe: Tiny
) -> None:
    """With dropout the reference drops what the core says, by the rows' numbers."""
    more = [f"precision.compute={compute}", "batch.micro_batch_size=2", "schedule.steps=4"]
    recipe = tiny_recipe("crystal", LORA % dropout, *more)
    if dropout != "0.0" and refused(name, recipe, "dropout"):
        return
    weights = initial(recipe, 2.0)
    for key in weights:
        if key.endswith("lora_b"):  # zero at first, where A would have no gradient
            weights[key] = torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(0)) / 4
    run = prepare(name, recipe)
    run.import_state(state_with(weights, recipe=recipe))
    batch = source_of(recipe).rows(0, 0, 4)
    loss, gradients = run.gradients(batch)
    keys = row_keys(recipe.seed, 0, 0, 4, 4, torch.device("cpu")) if dropout != "0.0" else None
    wanted_loss, wanted = reference(recipe, weights, batch, keys)
    tolerance = 2e-5 if compute == "float32" else 0.06
    assert loss == pytest.approx(wanted_loss, rel=tolerance)
    assert gradients.keys() == wanted.keys()
    errors = {key: relative(gradients[key], wanted[key]) for key in wanted}
    assert max(errors.values()) < tolerance, max(errors.items(), key=lambda item: item[1])
    if keys is not None:
        assert reference(recipe, weights, batch)[0] != pytest.approx(wanted_loss, rel=1e-4)
    list(run.train(source_of(recipe)))
    state = run.export_state()
    assert {key for key, tensor in weights_of(state).items() if not torch.equal(tensor, weights[key])} == wanted.keys()

    first = prepare(name, recipe, steps=2)
    first.import_state(state_with(weights, recipe=recipe))
    list(first.train(source_of(recipe)))
    second = prepare(name, recipe, start=2)
    second.import_state(first.export_state())
    list(second.train(source_of(recipe)))
    assert same_state(second.export_state(), state)


def test_a_model_of_merged_weights_gives_the_logits_of_the_adapters(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("llama", LORA % "0.5")
    weights = initial(recipe, 2.0)
    for key in weights:
        if key.endswith("lora_b"):
            weights[key] = torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(0)) / 4
    state, ids = state_with(weights, recipe=recipe), torch.arange(13)[None] * 7
    run: Any = prepare("local", recipe)
    run.import_state(state)
    model = load_model(Weights(state.tensors, recipe.tuning.lora), recipe.model)
    with torch.no_grad():
        ours, merged = run.model.logits(ids), model.logits(ids)
    assert relative(merged, ours) < 1e-5
    base = load_model({key: weights[key] for key in weights if "lora" not in key}, recipe.model)
    assert relative(base.logits(ids), ours) > 0.01
    with pytest.raises(CheckpointError, match=r"lora_a' and \d+ others are unknown to the model"):
        load_model(Weights(state.tensors), recipe.model)
