"""Copies between device and host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from streaming_runs import SIX_LAYERS, assert_same, prepare, streaming, trained

from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]


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
