"""Compute copies whose feed-forward is padded: the same results, and nothing of the padding outside of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from float64_reference import initial, reference, relative, state_with

from weftrain.backends.common import decoder
from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.parameters import ParameterSpec, Role


def trained(recipe: Recipe) -> tuple[list[float], dict[str, torch.Tensor], Mapping[str, torch.Tensor], Any]:
    """Losses, gradients of another batch, the state, and the run."""
    local = get_backend("local")
    run: Any = local.prepare(Job(recipe, Plan(0, 3), local.options.model_validate({"threads": 1})))
    run.import_state(state_with(initial(recipe, 4.0)))
    source = synthetic_source(recipe.model.vocab_size, recipe.data.sequence_length, 12, 4, 5)
    _, gradients = run.gradients(source.rows(0, 0, 4))
    return [float(result.loss) for result in run.train(source)], gradients, dict(run.export_state().tensors), run


@pytest.mark.parametrize("family", ["crystal", "amber"])
@pytest.mark.parametrize("micro", [4, 2])  # without and with accumulation
def test_padded_copies_compute_the_same(
    family: str, micro: int, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inner features of 70 become 128 zeros and numbers; masters, gradients and state keep their shapes and values."""
    recipe = tiny_recipe(
        family,
        "model.intermediate_size=70",
        "precision.compute=bfloat16",
        f"batch.micro_batch_size={micro}",
        "batch.global_batch_size=4",
    )
    losses, gradients, state, plain = trained(recipe)
    assert not plain.bound.padded
    monkeypatch.setitem(decoder._INNER_MULTIPLE, "cpu", 64)
    padded_losses, padded_gradients, padded_state, run = trained(recipe)
    names = set(run.bound.padded)
    assert {name.rpartition(".ffn.")[2] for name in names} >= {"up_proj.weight", "down_proj.weight"}
    assert all(128 in run.bound.parameters[name].shape for name in names)
    assert padded_losses == losses
    for name, gradient in gradients.items():
        assert torch.equal(padded_gradients[name], gradient), name
    for name, tensor in state.items():
        assert torch.equal(padded_state[name], tensor), name
    for name in names:  # the padding stayed zero, and the copies are the rounded masters
        parameter = run.bound.parameters[name].detach().float()
        master = run.planes["weights"][name]
        assert torch.equal(run.bound.own(name, parameter), master.bfloat16().float())
        assert parameter.double().square().sum() == master.bfloat16().double().square().sum()


def test_padded_copies_against_float64(tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 has 8 bits: a gradient is a few thousandths away, with and without padding."""
    monkeypatch.setitem(decoder._INNER_MULTIPLE, "cpu", 64)
    recipe = tiny_recipe(
        "crystal", "model.intermediate_size=70", "precision.compute=bfloat16", "batch.micro_batch_size=2"
    )
    local, weights = get_backend("local"), initial(recipe, 4.0)
    run: Any = local.prepare(Job(recipe, Plan(0, 1), local.options()))
    run.import_state(state_with(weights))
    batch = synthetic_source(97, recipe.data.sequence_length, 12, recipe.batch.global_batch_size, 5).rows(0, 0, 4)
    wanted_loss, wanted = reference(recipe, weights, batch)
    loss, gradients = run.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    for name in run.bound.padded:
        assert relative(gradients[name], wanted[name]) < 0.03, name


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_where_weights_lie(compute: torch.dtype) -> None:
    """On the device, but for frozen ones that it has in bf16; a norm and a router's bias compute in fp32 always."""
    specs = [
        ParameterSpec("layers.0.attention_norm.weight", (4,), Role.NORM_WEIGHT, trained=False),
        ParameterSpec("layers.0.ffn.router.bias", (2,), Role.ROUTER_BIAS, trained=False),
        ParameterSpec("layers.0.attention.q_proj.weight", (4, 4), Role.MATRIX, trained=False),
        ParameterSpec("layers.0.attention.k_proj.weight", (4, 4), Role.MATRIX),
    ]
    found = decoder.memory_of_weights(specs, compute, torch.device("meta"))
    assert {name.split(".")[-2]: weight.device.type for name, weight in found.items()} == {
        "attention_norm": "meta",
        "router": "meta",
        "q_proj": "meta" if compute == torch.float32 else "cpu",
        "k_proj": "meta",
    }
    assert all(weight.dtype == torch.float32 for weight in found.values())
