"""Bit for bit the local backend: every tier, mode, format and accumulation, tied and untied, over six steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from streaming_runs import SIX_LAYERS, TIERS, assert_same, prepare, source_of, streaming, trained

from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.order.batch import Batch

Tiny = Callable[..., Recipe]
BIASES = "model.experts.bias_update=0.01"


_CLIPPED = [
    (family, tier, activations, micro, "0.5")
    for family, tiers in (("crystal", TIERS), ("amber", TIERS[-1:]))
    for tier in tiers
    for activations in ("keep", "recompute")
    for micro in (4, 1)
]
_LOCAL: dict[tuple[str, ...], tuple[list[float], list[float], State]] = {}


def local(tiny_recipe: Tiny, *overrides: str) -> tuple[Recipe, tuple[list[float], list[float], State]]:
    """A recipe, and what the local backend makes of it: computed once."""
    recipe = tiny_recipe(*overrides)
    if overrides not in _LOCAL:
        run = prepare(recipe)
        losses, norms, state = trained(run, recipe)
        held = {name: state.tensors[name] for name in state.tensors}
        _LOCAL[overrides] = losses, norms, State(state.step, state.optimizer_updates, held)
        run.close()
    return recipe, _LOCAL[overrides]


@pytest.mark.parametrize(
    ("family", "tier", "activations", "micro", "clip"),
    [*_CLIPPED, *(("crystal", tier, "keep", 4, "null") for tier in TIERS)],
)
def test_equals_local(
    family: str, tier: str, activations: str, micro: int, clip: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    overrides = (f"batch.micro_batch_size={micro}", f"optimizer.clip_norm={clip}")
    recipe, (losses, norms, state) = local(tiny_recipe, family, SIX_LAYERS, *overrides)
    assert max(norms) > 0.5, "the clip must bite"
    run = streaming(recipe, tmp_path, tier, activations=activations)
    found_losses, found_norms, found = trained(run, recipe)
    assert found_losses == losses
    assert found_norms == norms
    assert_same(found, state)
    run.close()


@pytest.mark.parametrize(
    ("tier", "activations", "compute", "more"),
    [
        ("ram", "keep", "float32", ["precision.numerics=replayable"]),
        ("direct", "recompute", "bfloat16", [BIASES]),
        # nothing is trained before layer 2, so that no bias moves there; in layer 3 nothing moves but the bias
        ("mapped", "keep", "float32", [BIASES, "tuning.freeze=[embedding.*,layers.0.*,layers.1.*,layers.3.*]"]),
    ],
)
def test_experts_equal_local(
    tier: str, activations: str, compute: str, more: list[str], tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """The first layer is dense, and its record smaller than the others."""
    always = ["model.experts.aux_loss=0.5", "batch.micro_batch_size=2", f"precision.compute={compute}"]
    recipe = tiny_recipe("moe", SIX_LAYERS, *always, *more)
    one, run = prepare(recipe), streaming(recipe, tmp_path, tier, activations=activations)
    for found, wanted in zip(run.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert (found.loss, found.grad_norm) == (wanted.loss, wanted.grad_norm)
        assert found.measures == wanted.measures
        assert float(found.measures["router_load_max"]) > 1
    state = run.export_state()
    assert_same(state, one.export_state())
    moved = [name for name in state.tensors if name.endswith("router.bias") and state.tensors[name].any()]
    first = 2 if any(item.startswith("tuning") for item in more) else 1
    assert moved == [f"weights/layers.{layer}.ffn.router.bias" for layer in range(first, 6) if BIASES in more]
    run.close()


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ([], {"open_to_replicas": True}, "model.experts: replicas do not count what routers do: set batch.replicas=1"),
        ([], {"compile": True}, "backend.options.compile is true and model.experts is given"),
    ],
)
def test_what_experts_cannot_have(
    changes: list[str], options: dict[str, bool], words: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match=words):
        streaming(tiny_recipe("moe", *changes), tmp_path, "ram", **options)


@pytest.mark.parametrize(
    ("preferences", "tier", "micro"),
    [
        pytest.param(preferences, tier, micro, marks=() if (tier == "mapped") == (micro == 2) else pytest.mark.soak)
        for preferences in ("[cpp,torch,reference]", "[reference]")
        for tier in TIERS
        for micro in (4, 2)
    ],
)
def test_equals_local_in_bf16(preferences: str, tier: str, micro: int, tiny_recipe: Tiny, tmp_path: Path) -> None:
    overrides = ["precision.compute=bfloat16", f"batch.micro_batch_size={micro}", f"kernels.preferences={preferences}"]
    recipe, (losses, norms, state) = local(tiny_recipe, "crystal", SIX_LAYERS, *overrides)
    run = streaming(recipe, tmp_path, tier)
    found_losses, found_norms, found = trained(run, recipe)
    assert (found_losses, found_norms) == (losses, norms)
    assert_same(found, state)
    run.close()


@pytest.mark.parametrize("tier", TIERS)
def test_ring_of_any_size_and_tiles_of_any_size(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe, wanted = local(tiny_recipe, "amber", SIX_LAYERS)
    for number, (slots, tile) in enumerate([(2, 4096), (3, 8192), (5, 1 << 20), (6, 4096), (9, 12345)]):
        run = streaming(recipe, tmp_path / str(number), tier, layer_slots=slots, tile_elements=tile)
        losses, norms, state = trained(run, recipe)
        assert (losses, norms) == wanted[:2]
        assert_same(state, wanted[2])
        run.close()


QUICK = ("qwen3", "olmo3", "pythia")  # together every field that changes what a record of the store holds


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.prove) for name in FAMILIES]
)
def test_every_model_family_equals_local(name: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Three steps in micro-batches of two rows, and the gradients of rows that hold two documents."""
    recipe = tiny_recipe("amber", "batch.micro_batch_size=2", "optimizer.clip_norm=0.5", "schedule.steps=3")
    recipe = recipe.model_copy(update={"model": FAMILIES[name].ours})
    start = np.where(np.arange(13) < 6, 0, 6).astype(np.int32)[None].repeat(4, 0)
    rows = Batch(np.random.default_rng(0).integers(0, 97, (4, 14)), document_start=start)
    run = prepare(recipe, steps=3, threads=1)
    wanted_loss, gradients = run.gradients(rows)
    losses, norms, state = trained(run, recipe)
    for tier in TIERS:
        # with recomputation where the weights come from the disk a second time
        activations = "recompute" if tier == "direct" else "keep"
        other = streaming(recipe, tmp_path / tier, tier, steps=3, threads=1, activations=activations)
        loss, found = other.gradients(rows)
        assert loss == wanted_loss
        assert all(torch.equal(found[key], gradients[key]) for key in gradients)
        found_losses, found_norms, found_state = trained(other, recipe)
        assert (found_losses, found_norms) == (losses, norms)
        assert_same(found_state, state)
        other.close()
    run.close()
