"""The executor moves exactly the bytes of its schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streaming_runs import SIX_LAYERS, small, source_of, streaming

from weftrain.backends.streaming.placement import Placement
from weftrain.backends.streaming.planner import draw
from weftrain.backends.streaming.schedule import PassScheduler
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError

Tiny = Callable[..., Recipe]


@pytest.mark.parametrize("tier", ["ram", "mapped", "direct"])
def test_a_step_moves_what_show_prints(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """The engine refuses a pass that moves other bytes; here the figures of a step in the middle are compared once
    more.
    """
    recipe = tiny_recipe("crystal", SIX_LAYERS)
    run = streaming(recipe, tmp_path, tier)
    moved = [(run.stats()["store_in_bytes"], run.stats()["store_out_bytes"]) for _ in run.train(source_of(recipe))]
    ring = 2 if tier == "direct" else 0
    layout = run.store.layout
    schedule = PassScheduler(layout, tier, Placement(ring), 1 << 30).step(first_update=0)
    assert moved[2] == moved[3] == (schedule.bytes_read, schedule.bytes_written)
    text = "\n".join(draw(schedule))
    assert "update and forward layers" in text
    assert "######" in text
    run.close()


def test_bytes_that_the_schedule_does_not_know_are_an_error(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path, "direct", 2)
    original = run.store.spool

    def twice(tile: Any, gradient: Any) -> None:
        original(tile, gradient)
        if tile.index == 0:
            original(tile, gradient)

    run.store.spool = twice
    with pytest.raises(BackendError, match="the schedule says"):
        list(run.train(source_of(recipe)))
    run.close()
