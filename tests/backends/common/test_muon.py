"""Muon in a run: torch.optim.Muon's bits from the same gradients, the same bits after a restart, and the best direction
that float64 knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from weftrain.backends.common.muon import MuonUpdate
from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan, Run
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.batch import BatchSource
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.run.prepare import prepare_run
from weftrain.kernels import reference

Tiny = Callable[..., Recipe]
MUON = ("optimizer.name=muon", "data.sources=[]", "data.synthetic_rows=8", "schedule.steps=4")


def run_of(recipe: Recipe, start: int = 0) -> Run:
    local = get_backend("local")
    return local.prepare(Job(recipe, Plan(start, recipe.schedule.steps), local.options()))


def made_up(recipe: Recipe) -> BatchSource:
    rows, batch = recipe.data.synthetic_rows, recipe.batch.global_batch_size
    assert rows is not None
    return synthetic_source(recipe.model.vocab_size, recipe.data.sequence_length, rows, batch, seed=5)


@pytest.mark.parametrize(("scale", "theirs"), [("match_adamw", "match_rms_adamw"), ("original", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_bits_of_torchs(scale: str, theirs: str, nesterov: bool, tiny_recipe: Tiny) -> None:
    muon = f"optimizer.muon={{scale: {scale}, nesterov: {str(nesterov).lower()}}}"
    recipe = tiny_recipe("amber", *MUON, muon, "optimizer.clip_norm=null", "optimizer.weight_decay=0.1")
    groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
    names = next(group for group in groups if group.optimizer == "muon").parameters
    drawn = torch.Generator().manual_seed(0)
    shapes = {spec.name: spec.shape for spec in recipe.parameters if spec.name in names}
    weights = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    copies = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    planes = {"weights": weights, "exp_avg": {name: torch.zeros(shape) for name, shape in shapes.items()}}
    mine = MuonUpdate(recipe, groups, copies, reference.newton_schulz)
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    other = torch.optim.Muon(parameters.values(), weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs)
    for step in range(3):
        rates = group_learning_rates(groups, recipe.schedule, step + 1)
        other.param_groups[0]["lr"] = rates["muon_matrices"]
        gradients = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        mine.update(planes, gradients, rates, torch.ones(()))
        other.step()
        for name, parameter in parameters.items():
            assert torch.equal(weights[name], parameter.detach()), (step, name)
            assert torch.equal(copies[name], weights[name].bfloat16())


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_each_expert_of_a_stack_moves_as_if_it_were_alone(compute: str, tiny_recipe: Tiny) -> None:
    """The experts' matrices are [E, out, in]: each is divided by its own norm and has the scale of [out, in]. Their
    gradients have sizes from 1e-3 to 1e4, so one norm for the whole stack would lose the smaller ones. Products of a
    stack and of a matrix are different kernels, which may round differently.
    """
    recipe = tiny_recipe("moe", *MUON, f"optimizer.muon={{compute: {compute}}}", "optimizer.clip_norm=null")
    groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
    names = next(group for group in groups if group.optimizer == "muon").parameters
    shapes = {spec.name: spec.shape for spec in recipe.parameters if spec.name in names and len(spec.shape) == 3}
    assert {name.split(".")[-2] for name in shapes} == {"gate_proj", "up_proj", "down_proj"}
    drawn = torch.Generator().manual_seed(3)
    sizes = torch.logspace(-3, 4, recipe.model.experts.count).view(-1, 1, 1)  # type: ignore[union-attr]
    weights = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    gradients = {name: torch.randn(shape, generator=drawn) * sizes for name, shape in shapes.items()}
    planes = {"weights": weights, "exp_avg": {name: torch.zeros(shape) for name, shape in shapes.items()}}
    only = [dataclasses.replace(group, parameters=tuple(shapes)) for group in groups if group.optimizer == "muon"]
    rates = group_learning_rates(groups, recipe.schedule, 2)
    MuonUpdate(recipe, only, {}, reference.newton_schulz).update(planes, gradients, rates, torch.ones(()))
    assert recipe.optimizer.muon is not None
    a, b, c = recipe.optimizer.muon.coefficients
    rate, decay = rates["muon_matrices"], only[0].weight_decay
    for name, weight in weights.items():
        for expert, moved in enumerate(weight):
            momentum = gradients[name][expert].to(getattr(torch, compute))  # Nesterov's, up to a factor, which is lost
            alone = reference.newton_schulz(momentum, a=a, b=b, c=c, iterations=5, eps=1e-7)
            step = alone.float() * rate * recipe.optimizer.muon.scale_of(shapes[name])
            wanted = before[name][expert] * (1 - rate * decay) - step
            error = (moved - wanted).norm() / step.norm()
            assert error < (0.05 if compute == "bfloat16" else 1e-3), (name, expert, float(error))


def test_a_run_clips_and_goes_on_with_the_same_bits(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("crystal", *MUON, "optimizer.muon={scale: spectral, compute: float32}")
    source, (whole, first) = made_up(recipe), (run_of(recipe), run_of(recipe))
    results = list(whole.train(source))
    assert results[-1].loss < results[0].loss
    half = first.train(source)
    next(half), next(half)
    state = first.export_state()
    assert (
        f"exp_avg_sq/{next(spec.name for spec in recipe.parameters if spec.optimizer == 'muon')}" not in state.tensors
    )
    second = run_of(recipe, start=2)
    second.import_state(dataclasses.replace(state, tensors=dict(state.tensors.items())))
    list(second.train(source))
    expected, found = (run.export_state().tensors for run in (whole, second))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_large_gradient_is_scaled_before_it_enters_the_momentum(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", *MUON, "optimizer.muon={momentum: 0.9}")
    groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
    names = next(group for group in groups if group.optimizer == "muon").parameters
    shapes = {spec.name: spec.shape for spec in recipe.parameters if spec.name in names}
    planes = {plane: {name: torch.zeros(shape) for name, shape in shapes.items()} for plane in ("weights", "exp_avg")}
    gradients = {name: torch.ones(shape) for name, shape in shapes.items()}
    update = MuonUpdate(recipe, groups, {}, reference.newton_schulz)
    update.update(planes, gradients, group_learning_rates(groups, recipe.schedule, 1), torch.tensor(0.25))
    for average in planes["exp_avg"].values():
        torch.testing.assert_close(average, torch.full_like(average, 0.1 * 0.25))


@pytest.mark.parametrize("backend", ["streaming", "cerebras"])
def test_backends_without_it_refuse_by_name(backend: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", *MUON, "optimizer.muon={}", f"backend.name={backend}")
    chosen = get_backend(backend)
    with pytest.raises(BackendError, match=f"optimizer.name is muon and the {backend} backend updates every parameter"):
        prepare_run(chosen, Job(recipe, Plan(0, 4), chosen.options()))
