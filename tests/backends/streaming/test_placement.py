"""Slots: each record's weights stay where they are for as long as they are needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from streaming_runs import SIX_LAYERS

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.placement import Placement, Slots, gradient_bytes
from weftrain.backends.streaming.schedule import LOADING, PassScheduler
from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]


@pytest.mark.parametrize("tier", ["ram", "mapped", "direct"])
@pytest.mark.parametrize("states", [set(), {0}, {2, 5}, {0, 1, 3, 4, 7}, set(range(8))])
def test_every_computation_has_its_weights(tier: str, states: set[int], tiny_recipe: Tiny) -> None:
    """Simulates slots that layers share, of which some keep theirs: what is read was brought and is still there."""
    layout = layout_of(tiny_recipe("amber", SIX_LAYERS), StreamingOptions(tile_elements=4096))
    placement = Placement(2, True, frozenset(states))
    scheduler, slots = PassScheduler(layout, tier, placement, 1 << 30), Slots(layout, placement)
    own = [slots.number(record) for record in layout.records if record.index in states]
    assert len(set(own)) == len(own)
    for schedule in (scheduler.step(None), scheduler.step(0), scheduler.evaluation(0)):
        there: dict[int, int] = {slots.number(layout.records[index]): index for index in states}
        for event in schedule.events:
            slot, record = slots.number(event.record), event.record.index
            if event.kind == "resident":
                assert there[slot] == record
            elif event.kind in LOADING:
                assert slot not in there or record in states
                there[slot] = record
            elif event.kind == "free":
                assert record not in states
                del there[slot]
            elif event.kind in ("forward", "loss") or (event.kind == "backward" and record > 0):
                assert there[slot] == record


def test_bytes_that_are_copied(tiny_recipe: Tiny) -> None:
    """Weights twice, but for the layers whose slots survive from forward to backward; each gradient once; nothing of
    what stays.
    """
    layout = layout_of(tiny_recipe("amber", SIX_LAYERS), StreamingOptions(tile_elements=4096))
    weights = [record.compute_bytes for record in layout.records]
    gradients = [gradient_bytes(record) for record in layout.records]
    plain = PassScheduler(layout, "ram", Placement(2, True), 0).step(0)
    assert plain.to_device_bytes == sum(weights) + sum(weights[1:5])
    assert plain.to_host_bytes == sum(gradients)
    kept = PassScheduler(layout, "ram", Placement(2, True, frozenset({0, 2, 4, 7}), frozenset({1})), 0).step(0)
    assert kept.to_device_bytes == sum(weights[n] for n in (1, 3, 5, 6)) + weights[1] + weights[3]
    waiting = sum(tile.gradient_bytes for tile in layout.records[1].tiles)
    assert kept.to_host_bytes == waiting + sum(gradients[n] for n in (3, 5, 6))
    everything = PassScheduler(layout, "ram", Placement(1, True, frozenset(range(8))), 0).step(0)
    assert (everything.to_device_bytes, everything.to_host_bytes) == (0, 0)
    through = PassScheduler(layout, "mapped", Placement(1, True, frozenset(range(8))), 0).step(0)
    assert (through.bytes_read, through.to_device_bytes) == (0, 0)
    assert through.bytes_written == sum(tile.bytes + tile.gradient_bytes for tile in layout.tiles)
