"""Bit for bit the local backend: every tier, mode, format and accumulation, tied and untied, over six steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weftrain.backends.registry import get_backend
from weftrain.core.backend import Job, Plan, Run, State
from weftrain.core.config import Recipe
from weftrain.core.synthetic import SyntheticSource, synthetic_source

Tiny = Callable[..., Recipe]
SIX_LAYERS = "model.num_layers=6"  # more than the ring holds
TIERS = ("ram", "mapped", "direct")


def source_of(recipe: Recipe) -> SyntheticSource:
    rows = recipe.data.synthetic_rows
    assert rows is not None
    return synthetic_source(recipe.model.vocab_size, recipe.data.sequence_length, rows, recipe.batch.global_batch_size, seed=5)


def prepare(recipe: Recipe, name: str = "local", folder: Path | None = None, steps: int = 6, start: int = 0, **options: object) -> Run:
    backend = get_backend(name)
    chosen = backend.options.model_validate({**recipe.backend.options, **options})
    return backend.prepare(Job(recipe, Plan(start, steps), chosen, folder=folder))


def streaming(recipe: Recipe, folder: Path, tier: str, **options: object) -> Run:
    small = {"tile_elements": 4096, "poison_freed_slots": tier == "direct", "layer_slots": 2} | options
    return prepare(recipe, "streaming", folder, tier=tier, **small)


def trained(run: Run, recipe: Recipe) -> tuple[list[float], list[float], State]:
    results = list(run.train(source_of(recipe)))
    return [float(result.loss) for result in results], [float(result.grad_norm) for result in results], run.export_state()


def assert_same(found: State, wanted: State) -> None:
    assert (found.step, found.optimizer_updates) == (wanted.step, wanted.optimizer_updates)
    assert set(found.tensors) == set(wanted.tensors)
    different = [name for name in wanted.tensors if not torch.equal(found.tensors[name], wanted.tensors[name])]
    assert not different, different


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("clip", ["0.5", "null"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", ["crystal", "amber"])
def test_equals_local(family: str, tier: str, activations: str, clip: str, micro: int, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(family, SIX_LAYERS, f"batch.micro_batch_size={micro}", f"optimizer.clip_norm={clip}")
    losses, norms, state = trained(prepare(recipe), recipe)
    assert max(norms) > 0.5, "the clip must bite"
    run = streaming(recipe, tmp_path, tier, activations=activations)
    found_losses, found_norms, found = trained(run, recipe)
    assert found_losses == losses
    assert found_norms == norms
    assert_same(found, state)
    run.close()


@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("preferences", ["[cpp,torch,reference]", "[reference]"])
def test_equals_local_in_bf16(preferences: str, tier: str, micro: int, tiny_recipe: Tiny, tmp_path: Path) -> None:
    overrides = ["precision.compute=bfloat16", f"batch.micro_batch_size={micro}", f"kernels.preferences={preferences}"]
    recipe = tiny_recipe("crystal", SIX_LAYERS, *overrides)
    losses, norms, state = trained(prepare(recipe), recipe)
    run = streaming(recipe, tmp_path, tier)
    found_losses, found_norms, found = trained(run, recipe)
    assert (found_losses, found_norms) == (losses, norms)
    assert_same(found, state)
    run.close()


@pytest.mark.parametrize("tier", TIERS)
def test_ring_of_any_size_and_tiles_of_any_size(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe("amber", SIX_LAYERS)
    wanted = trained(prepare(recipe), recipe)
    for number, (slots, tile) in enumerate([(2, 4096), (3, 8192), (5, 1 << 20), (6, 4096), (9, 12345)]):
        run = streaming(recipe, tmp_path / str(number), tier, layer_slots=slots, tile_elements=tile)
        losses, norms, state = trained(run, recipe)
        assert (losses, norms) == wanted[:2]
        assert_same(state, wanted[2])
        run.close()
