"""The schedule: every computation finds its weights, and the bytes are those of the layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from streaming_runs import SIX_LAYERS

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.placement import Placement
from weftrain.backends.streaming.schedule import LOADING, PassScheduler
from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]


def options(**chosen: Any) -> StreamingOptions:
    return StreamingOptions.model_validate({"tile_elements": 4096, **chosen})


@pytest.mark.parametrize(("tier", "slots"), [("ram", 0), ("mapped", 0), ("direct", 2), ("direct", 3), ("direct", 6)])
def test_every_computation_has_its_weights(tier: str, slots: int, tiny_recipe: Tiny) -> None:
    """Simulates the slots: what a forward or backward reads was brought, and nothing took its place since."""
    layout = layout_of(tiny_recipe("amber", SIX_LAYERS), options(tier=tier))
    scheduler = PassScheduler(layout, tier, Placement(slots), 1 << 30)
    for first in (None, 0, len(layout.tiles) // 2):
        for schedule in (scheduler.step(first), scheduler.evaluation(first)):
            there: dict[int, int] = {}
            for event in schedule.events:
                slot = event.record.index if slots == 0 else scheduler.slots.number(event.record)
                if event.kind == "resident":
                    assert slots == 0 or there[slot] == event.record.index
                if event.kind in LOADING:
                    there[slot] = event.record.index
                elif event.kind in ("forward", "loss") or (event.kind == "backward" and event.record.index > 0):
                    assert there[slot] == event.record.index
                elif event.kind == "free":
                    there.pop(slot, None)
    order = [
        (event.kind, event.record.index)
        for event in scheduler.step(0).events
        if event.kind in ("forward", "loss", "backward")
    ]
    assert order == [*(("forward", i) for i in range(7)), ("loss", 7), *(("backward", i) for i in range(6, -1, -1))]


def test_bytes_are_those_of_the_layout(tiny_recipe: Tiny) -> None:
    layout = layout_of(tiny_recipe("amber", SIX_LAYERS), options(tier="direct"))
    first = layout.records[0].tiles
    holding = 2 * sum(tile.bytes - tile.compute_bytes + tile.gradient_bytes for tile in first)
    scheduler = PassScheduler(layout, "direct", Placement(2), holding)
    state = sum(tile.bytes for tile in layout.tiles)
    gradients = sum(tile.gradient_bytes for tile in layout.tiles)
    # four of six layers are gone when their backward comes
    again = sum(record.compute_bytes for record in layout.records[1:5])
    assert scheduler.step(0).bytes_read == state + gradients + again
    assert scheduler.step(0).bytes_written == state + gradients
    assert scheduler.step(None).bytes_written == gradients
    ahead = sum(tile.bytes - tile.compute_bytes for tile in first)
    assert scheduler.step(0, read_ahead=True).ahead_bytes == ahead
    scheduler.came_ahead = True
    assert scheduler.step(0, read_ahead=True).bytes_read == state + gradients + again
    assert PassScheduler(layout, "direct", Placement(2), 1 << 30).ahead == list(layout.tiles)
