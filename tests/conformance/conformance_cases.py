"""What the files of the suite share: the backends, a run of each, and comparisons of states."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from weftrain.backends.common.registry import find_backends, get_backend
from weftrain.core.backend import Backend, Job, Plan, Run, State
from weftrain.core.config import Recipe
from weftrain.core.run.prepare import prepare_run

FOUND = find_backends()
TRAINERS = sorted(
    name for name, backend in FOUND.items() if backend.returns_gradients and backend.unavailable() is None
)
Tiny = Callable[..., Recipe]


def of(name: str) -> str:
    """The backend of a case's name."""
    return re.split(r"[-+]", name)[0]


def prepare(name: str, recipe: Recipe, steps: int | None = None, start: int = 0) -> Run:
    """A run of a backend; `name-ranks`: of the world of so many that the fixture made."""
    name, apart, _ = name.partition("+")
    name, _, ranks = name.partition("-")
    if apart:
        options = {"device_memory_limit_mib": 4096, "layers_on_device": 1, "poison_freed_slots": True}
        recipe = recipe.model_copy(update={"backend": recipe.backend.model_copy(update={"options": options})})
    if ranks:
        each = recipe.batch.global_batch_size // int(ranks)
        batch = {"replicas": int(ranks), "micro_batch_size": min(recipe.batch.micro_batch_size, each)}
        recipe = recipe.model_copy(update={"batch": recipe.batch.model_copy(update=batch)})
    backend: Backend = get_backend(name)
    plan = Plan(start, recipe.schedule.steps if steps is None else steps)
    return prepare_run(backend, Job(recipe, plan, backend.options.model_validate(recipe.backend.options)))


def same_state(a: State, b: State) -> bool:
    assert a.tensors.keys() == b.tensors.keys()
    counts = (a.step, a.optimizer_updates) == (b.step, b.optimizer_updates)
    return counts and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def weights_of(state: State) -> dict[str, torch.Tensor]:
    return {name.partition("/")[2]: tensor for name, tensor in state.tensors.items() if name.startswith("weights/")}
