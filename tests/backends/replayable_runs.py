"""Runs for tests of `numerics: replayable`: on one backend or another, from one step to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ranks import source_of

from weftrain.backends.common.registry import find_backends
from weftrain.core.backend import Job, Plan, Run, State
from weftrain.core.config import Recipe
from weftrain.core.order.batch import BatchSource
from weftrain.core.order.synthetic import synthetic_source


def prepare(
    name: str, recipe: Recipe, start: int = 0, steps: int = 4, folder: Path | None = None, **options: Any
) -> Run:
    backend = find_backends()[name]
    if name == "cuda":  # its other ranks take the options from the recipe
        return backend.prepare(Job(recipe, Plan(start, steps), backend.options.model_validate(recipe.backend.options)))
    return backend.prepare(
        Job(
            recipe,
            Plan(start, steps),
            backend.options(device="cpu", threads=1, huge_pages=False, **options),
            folder=folder,
        )
    )


def rows_of(recipe: Recipe) -> BatchSource:
    return synthetic_source(
        recipe.model.vocab_size, recipe.data.sequence_length, 32, recipe.batch.global_batch_size, seed=5
    )


def train(
    name: str, recipe: Recipe, start: int, stop: int, state: State | None = None, folder: Path | None = None
) -> tuple[State, list[tuple[float, float]]]:
    """The state that the steps end in, and loss and norm of each."""
    run = prepare(name, recipe, start, stop, folder)
    if state is not None:
        run.import_state(state)
    seen = [(float(result.loss), float(result.grad_norm)) for result in run.train(source_of(recipe))]
    found = run.export_state()
    copied = State(found.step, found.optimizer_updates, {name: found.tensors[name] for name in found.tensors})
    run.close()
    return copied, seen


def differing(found: State, wanted: State) -> list[str]:
    assert set(found.tensors) == set(wanted.tensors)
    return [name for name in wanted.tensors if not torch.equal(found.tensors[name], wanted.tensors[name])]
