"""Gradients of unlearning on every backend that takes the objective, against its formulas in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance_cases import same_state
from float64_reference import initial, state_with
from ranks import source_of

from weftrain.backends.common.registry import find_backends
from weftrain.backends.cuda.rendezvous import leave
from weftrain.core.backend import Job, Plan, Run, State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.order.batch import Batch
from weftrain.core.run.prepare import prepare_run
from weftrain.core.unlearning_section import (
    MaxEntropyObjective,
    MinPosteriorObjective,
    RandomMatchingObjective,
    RmuObjective,
    Unlearning,
)
from weftrain.kernels import select

FOUND = find_backends()
Tiny = Callable[..., Recipe]
WEIGHTS = {"forget": ("f",), "forget_weight": 0.7, "retain_weight": 1.3}
OBJECTIVES: list[Unlearning] = [
    MaxEntropyObjective(name="max_entropy", **WEIGHTS),  # type: ignore[arg-type]
    MinPosteriorObjective(name="min_posterior", threshold=-4.6, **WEIGHTS),  # type: ignore[arg-type]
    RandomMatchingObjective(name="random_matching", vector_seed=5, **WEIGHTS),  # type: ignore[arg-type]
    RmuObjective(name="rmu", layer=0, steering=2.0, **WEIGHTS),  # type: ignore[arg-type]
]


def of_objective(objective: Unlearning, recipe: Recipe) -> Recipe:
    return Recipe.model_validate(recipe.model_dump(mode="json") | {"objective": objective.model_dump(mode="json")})


def prepare(name: str, recipe: Recipe) -> Run:
    """A run of a backend; `name-ranks`: of the world of so many that the fixture made; `name+device`: see conftest."""
    name, _, apart = name.partition("+")
    name, _, ranks = name.partition("-")
    options = {"device_memory_limit_mib": 4096, "layers_on_device": 1, "poison_freed_slots": True} if apart else {}
    if ranks:
        batch = recipe.batch.model_copy(update={"replicas": int(ranks)})
        recipe = recipe.model_copy(update={"batch": batch})
    backend = FOUND[name]
    return prepare_run(backend, Job(recipe, Plan(0, recipe.schedule.steps), backend.options.model_validate(options)))


def decoder(recipe: Recipe, weights: dict[str, torch.Tensor]) -> Decoder:
    model = Decoder(recipe.model, select(kernel_specs(recipe.model, "cpu", torch.float64), ["reference"])).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def states_of(model: Decoder, ids: torch.Tensor) -> list[torch.Tensor]:
    """The embedding's output and each block's."""
    embedding, *blocks, _ = model.segments()
    states = [embedding(ids)]
    for block, rotary in zip(blocks, model.rotary(ids.shape[1]), strict=True):
        states.append(block(states[-1], rotary))
    return states


def wanted_of(
    recipe: Recipe, weights: dict[str, torch.Tensor], frozen: dict[str, torch.Tensor], batch: Batch
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the definitions, token by token, from whole logits and whole states."""
    objective, model = recipe.objective, decoder(recipe, weights)
    assert isinstance(objective, (MaxEntropyObjective, MinPosteriorObjective, RandomMatchingObjective, RmuObjective))
    ids, labels = torch.from_numpy(batch.ids[:, :-1]), torch.from_numpy(batch.ids[:, 1:])
    bearing = torch.ones_like(labels, dtype=torch.bool)
    if batch.loss_mask is not None:
        bearing = torch.from_numpy(batch.loss_mask)
    assert batch.forget is not None
    forget = torch.from_numpy(batch.forget)[:, None].expand_as(bearing)
    states = states_of(model, ids)
    logits = model.segments()[-1].logits(states[-1], model.tied_weight())  # type: ignore[operator,union-attr]
    p = logits.softmax(-1)
    kept = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    if objective.name == "max_entropy":
        lost = (p * p.log()).sum(-1)
    elif objective.name == "min_posterior":
        own = p.gather(-1, labels[..., None])[..., 0]
        lost = torch.where(own.log() < objective.threshold, 0.0, -torch.log1p(-own))
    elif objective.name == "random_matching":
        vectors = torch.randn(97, 48, generator=torch.Generator().manual_seed(5)).double()[ids]
        every = [*states[:-1], model.final_norm(states[-1])]
        lost = torch.stack([1 - F.cosine_similarity(state, vectors, dim=-1).abs() for state in every]).mean(0)
    else:
        direction = torch.rand(48, generator=torch.Generator().manual_seed(42)).double()
        with torch.no_grad():
            before = states_of(decoder(recipe, frozen), ids)[1]
        lost = (states[1] - 2.0 * direction / direction.norm()).square().mean(-1)
        kept = (states[1] - before).square().mean(-1)
    loss = torch.where(forget, 0.7 * lost, 1.3 * kept)[bearing].sum() / bearing.sum()
    loss.backward()
    return loss.item(), {
        name: torch.zeros_like(weights[name]) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def batch_of(recipe: Recipe) -> Batch:
    """Four rows of unequal bearing tokens, two of them to be forgotten, one beside one that is not."""
    rng = np.random.default_rng(0)
    mask = rng.random((4, 13)) > np.array([0.1, 0.7, 0.3, 0.5])[:, None]
    return Batch(rng.integers(0, 97, (4, 14)), loss_mask=mask, forget=np.array([True, False, False, True]))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.name)
@pytest.mark.parametrize("family", ["amber", "crystal"])
def test_gradients(name: str, family: str, objective: Unlearning, tiny_recipe: Tiny) -> None:
    recipe = of_objective(objective, tiny_recipe(family, "batch.micro_batch_size=1"))
    if refused := set(objective.features) & FOUND[re.split(r"[-+]", name)[0]].unsupported:
        with pytest.raises(BackendError, match=f"objective.name is {objective.name}"):
            prepare(name, recipe)
        assert refused
        return
    run = prepare(name, recipe)
    state = run.export_state()
    frozen = {key.removeprefix("weights/"): one for key, one in state.tensors.items() if key.startswith("weights/")}
    weights, batch = initial(recipe, 2.0), batch_of(recipe)
    run.import_state(state_with(weights, recipe=recipe))
    loss, gradients = run.gradients(batch)
    wanted_loss, wanted = wanted_of(recipe, weights, frozen, batch)
    assert loss == pytest.approx(wanted_loss, rel=2e-5)
    assert gradients.keys() == {spec.name for spec in recipe.parameters if spec.trained}
    assert {name for name, gradient in wanted.items() if gradient.any()} <= gradients.keys()
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for key in gradients:
        gradient = wanted[key]
        assert (gradients[key] - gradient).norm() < 2e-5 * max(gradient.norm(), 0.01 * norm), key


def test_measures_are_means_over_each_kind(tiny_recipe: Tiny) -> None:
    recipe = of_objective(OBJECTIVES[0], tiny_recipe("amber", "batch.micro_batch_size=1", "schedule.steps=2"))

    class Source:
        """Two steps: the batch above, and one in which nothing is to be forgotten."""

        sequence_length, global_batch_size, dataset_id = 13, 4, "0" * 64

        def rows(self, step: int, first: int, count: int) -> Batch:
            whole = batch_of(recipe)
            marks = whole.forget if step == 0 else np.zeros(4, bool)
            return Batch(whole.ids, whole.loss_mask, forget=marks).take(slice(first, first + count))

        sample_names = cursors = None

    run = prepare("local", recipe)
    first, second = list(run.train(Source()))  # type: ignore[arg-type]
    marks = batch_of(recipe)
    bearing = int(marks.loss_mask.sum())  # type: ignore[union-attr]
    forgotten = int(marks.loss_mask[marks.forget].sum())  # type: ignore[index]
    forget, retain = (float(first.measures[name]) for name in ("forget_loss", "retain_loss"))
    assert -np.log(97) <= forget < 0 < retain
    assert float(first.loss) == pytest.approx(
        (0.7 * forget * forgotten + 1.3 * retain * (bearing - forgotten)) / bearing, rel=1e-5
    )
    assert np.isnan(float(second.measures["forget_loss"]))
    held = run.evaluate(Held(recipe))
    assert held.measures == {}
    assert held.loss == pytest.approx(np.log(97), abs=0.5)


class Held:
    name, num_rows, rows_available, sequence_length, dataset_id = "held", 4, 4, 13, ""

    def __init__(self, recipe: Recipe) -> None:
        self._batch = source_of(recipe).rows(0, 0, 4)

    def rows(self, first: int, count: int) -> Batch:
        return Batch(self._batch.ids[first : first + count])


class Steps:
    """As many steps as are asked for, of rows of which every second is to be forgotten."""

    sequence_length, global_batch_size, dataset_id = 13, 4, "0" * 64
    sample_names = cursors = None

    def rows(self, step: int, first: int, count: int) -> Batch:
        rng = np.random.default_rng(step)
        mask = rng.random((4, 13)) > np.array([0.1, 0.7, 0.3, 0.5])[:, None]
        whole = Batch(rng.integers(0, 97, (4, 14)), loss_mask=mask, forget=np.array([True, False, False, True]))
        return whole.take(slice(first, first + count))


def trained(
    name: str,
    recipe: Recipe,
    stop: int,
    start: State | None = None,
    first: dict[str, torch.Tensor] | None = None,
    options: dict[str, object] | None = None,
) -> tuple[list[float], State]:
    """Losses of steps start..stop - 1 and the state after them. first: weights that the run began with."""
    backend = FOUND[name]
    plan = Plan(0 if start is None else start.step, stop)
    job = Job(recipe, plan, backend.options.model_validate(options or {}), first if start is None else None)
    run = prepare_run(backend, replace(job, first_weights=first))
    if start is not None:
        run.import_state(start)
    losses = [float(result.loss) for result in run.train(Steps())]  # type: ignore[arg-type]
    state = run.export_state()
    found = State(state.step, state.optimizer_updates, {key: one.clone() for key, one in state.tensors.items()})
    run.close()
    return losses, found


@pytest.mark.parametrize("objective", OBJECTIVES[2:], ids=lambda one: one.name)
def test_killed_and_resumed_is_bit_for_bit_the_same_and_so_is_streaming(
    objective: Unlearning, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """The model that rmu began with comes from elsewhere: it is none that the seed would draw."""
    recipe = of_objective(objective, tiny_recipe("crystal", "batch.micro_batch_size=2", "schedule.steps=4"))
    first = initial(recipe, 2.0)
    losses, whole = trained("local", recipe, 4, first=first)
    _, half = trained("local", recipe, 2, first=first)
    again, resumed = trained("local", recipe, 4, half, first)
    assert again == losses[2:]
    assert same_state(resumed, whole)
    apart = {"device_memory_limit_mib": 4096, "layers_on_device": 1, "activations": "recompute"}
    on_disk = {"tier": "direct", "store": str(tmp_path / "store"), "poison_freed_slots": True}
    for options in ({}, {**apart, "poison_freed_slots": True}, on_disk):
        streamed, state = trained("streaming", recipe, 4, half, first, options)
        assert streamed == losses[2:]
        assert same_state(state, whole)


@pytest.mark.prove
def test_a_rank_of_cuda_resumes_to_the_same_bits(tiny_recipe: Tiny) -> None:
    recipe = of_objective(OBJECTIVES[3], tiny_recipe("crystal", "batch.micro_batch_size=2", "schedule.steps=4"))
    first = initial(recipe, 2.0)
    try:
        losses, whole = trained("cuda", recipe, 4, first=first)
        _, half = trained("cuda", recipe, 2, first=first)
        again, resumed = trained("cuda", recipe, 4, half, first)
    finally:
        leave()
    assert again == losses[2:]
    assert same_state(resumed, whole)


def test_replicas_of_streaming_do_not_have_the_model_that_rmu_reads(tiny_recipe: Tiny) -> None:
    asked = tiny_recipe("amber", "batch.micro_batch_size=1", "batch.replicas=2")
    backend, recipe = FOUND["streaming"], of_objective(OBJECTIVES[3], asked)
    job = Job(recipe, Plan(0, recipe.schedule.steps), backend.options.model_validate({}))
    with pytest.raises(BackendError, match="objective rmu: replicas do not have the model that the run began with"):
        prepare_run(backend, job)


def test_rmu_does_not_resume_without_the_model_that_it_began_with(tiny_recipe: Tiny) -> None:
    recipe = of_objective(OBJECTIVES[3], tiny_recipe("amber", "start_from={run: other, state: weights}"))
    backend = FOUND["local"]
    job = Job(recipe, Plan(1, recipe.schedule.steps), backend.options.model_validate({}))
    with pytest.raises(BackendError, match="reads the model that the run began with, and a start at step 1 was not"):
        prepare_run(backend, job)


def test_rmu_has_neither_gradient_nor_moments_behind_its_layer(tiny_recipe: Tiny) -> None:
    recipe = of_objective(OBJECTIVES[3], tiny_recipe("amber"))
    behind = {"layers.1", "final_norm", "head"}
    assert set(recipe.tuning.freeze or ()) == behind
    for spec in recipe.parameters:
        assert spec.trained != any(spec.name.startswith(f"{one}.") for one in behind)
