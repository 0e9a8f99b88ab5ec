"""Bit for bit the local backend: every tier, mode, format and accumulation, tied and untied, over six steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from streaming_runs import SIX_LAYERS, TIERS, assert_same, prepare, streaming, trained

from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("clip", ["0.5", "null"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", ["crystal", "amber"])
def test_equals_local(
    family: str, tier: str, activations: str, clip: str, micro: int, tiny_recipe: Tiny, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("tier", ["ram", "direct"])
def test_offloaded_activations_change_no_bit(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """On a CPU the hooks copy from memory to memory; slots are poisoned, so an offloaded weight would be stale or
    NaN.
    """
    recipe = tiny_recipe("crystal", SIX_LAYERS, "batch.micro_batch_size=2")
    wanted = trained(prepare(recipe), recipe)
    run = streaming(recipe, tmp_path, tier, offload_activations=True)
    losses, norms, state = trained(run, recipe)
    assert (losses, norms) == wanted[:2]
    assert_same(state, wanted[2])
    run.close()
