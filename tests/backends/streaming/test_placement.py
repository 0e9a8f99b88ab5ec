"""A device with memory of its own, for which a part of the CPU's memory stands in: what stays there, what is copied and
when, and that no bit of the results depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streaming_runs import SIX_LAYERS, TIERS, assert_same, prepare, streaming, trained

from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]
APART = {"device_memory_limit_mib": 4096, "poison_freed_slots": True}


@pytest.mark.parametrize("more", [{}, {"layers_on_device": 0}, {"layers_on_device": 3}])
@pytest.mark.parametrize("tier", TIERS)
def test_equals_local(tier: str, more: dict[str, Any], tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe("crystal", SIX_LAYERS, "batch.micro_batch_size=2")
    wanted = trained(prepare(recipe), recipe)
    run = streaming(recipe, tmp_path, tier, **APART, **more)
    losses, norms, state = trained(run, recipe)
    assert (losses, norms) == wanted[:2]
    assert_same(state, wanted[2])
    run.close()
