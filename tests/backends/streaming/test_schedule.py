"""The schedule: computed first, checkable, and true; the planner's needs and predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from streaming_runs import SIX_LAYERS, source_of, streaming

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.outline import draw
from weftrain.backends.streaming.planner import needs, predict, remedies
from weftrain.backends.streaming.schedule import LOADING, PassScheduler
from weftrain.core.config import Recipe
from weftrain.core.prediction import Speeds
from weftrain.core.recipe_file import load_recipe

Tiny = Callable[..., Recipe]


def options(**chosen: Any) -> StreamingOptions:
    return StreamingOptions.model_validate({"tile_elements": 4096, **chosen})


@pytest.mark.parametrize("slots", [0, 2, 3, 6])
@pytest.mark.parametrize("tier", ["ram", "mapped", "direct"])
def test_every_computation_has_its_weights(tier: str, slots: int, tiny_recipe: Tiny) -> None:
    """Simulates the slots: what a forward or backward reads was brought, and nothing took its place since."""
    if (tier == "direct") != (slots > 0):
        pytest.skip("slots belong to tier direct")
    layout = layout_of(tiny_recipe("amber", SIX_LAYERS), options(tier=tier))
    scheduler = PassScheduler(layout, tier, slots, 1 << 30)
    for first in (None, 0, len(layout.tiles) // 2):
        for schedule in (scheduler.step(first), scheduler.evaluation(first)):
            there: dict[int, int] = {}
            for event in schedule.events:
                slot = event.record.index if slots == 0 else scheduler.slot(event.record)
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
    scheduler = PassScheduler(layout, "direct", 2, 1 << 30)
    state = sum(tile.bytes for tile in layout.tiles)
    gradients = sum(tile.gradient_bytes for tile in layout.tiles)
    # four of six layers are gone when their backward comes
    again = sum(record.compute_bytes for record in layout.records[1:5])
    assert scheduler.step(0).bytes_read == state + gradients + again
    assert scheduler.step(0).bytes_written == state + gradients
    assert scheduler.step(None).bytes_written == gradients
    ahead = sum(tile.bytes - tile.compute_bytes for tile in layout.records[0].tiles)
    assert scheduler.step(0, read_ahead=True).ahead_bytes == ahead
    scheduler.came_ahead = True
    assert scheduler.step(0, read_ahead=True).bytes_read == state + gradients + again


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
    schedule = PassScheduler(layout, tier, ring, 1 << 30).step(first_update=0)
    assert moved[2] == moved[3] == (schedule.bytes_read, schedule.bytes_written)
    text = "\n".join(draw(schedule))
    assert "update and forward layers" in text
    assert "######" in text
    run.close()


def test_needs_follow_the_options() -> None:
    recipe = load_recipe("bench_70m", ["precision.compute=float32"]).recipe

    def total(**chosen: Any) -> int:
        chosen_options = StreamingOptions.model_validate({"buffer_mib": 64, **chosen})
        return needs(recipe, chosen_options, layout_of(recipe, chosen_options)).total_memory_bytes

    assert total(tier="direct") < total(tier="ram") - 600e6
    assert total(tier="direct", activations="recompute") < total(tier="direct")
    assert total(tier="direct", layer_slots=2) < total(tier="direct", layer_slots=6)
    assert needs(recipe, options(), layout_of(recipe, options())).disk_bytes == 0
    assert "tier=direct" in remedies(recipe, options())
    assert remedies(
        load_recipe("bench_70m", ["batch.micro_batch_size=1"]).recipe,
        options(tier="direct", activations="recompute", layer_slots=2, buffer_mib=1),
    ) == ("a smaller model, or a machine with more memory")


def test_the_limit_of_a_prediction_is_the_slowest() -> None:
    recipe = load_recipe("bench_70m").recipe
    chosen = StreamingOptions(tier="direct")

    def limit(**changes: float) -> str:
        speeds = Speeds(**{"matmul_flops": 4e11, "memory_bandwidth": 5e10, "disk_bandwidth": 5e9, **changes})
        found = predict(recipe, chosen, speeds)
        assert found.step_s >= max(value for name, value in found.parts.items() if name != "first record")
        return found.limit

    assert limit() == "compute"
    assert limit(disk_bandwidth=1e8) == "disk"
    assert limit(matmul_flops=1e15, memory_bandwidth=1e9, disk_bandwidth=1e12) == "memory"
    compute = predict(recipe, chosen, Speeds(4e11, 5e10, 5e9)).parts["compute"]
    assert compute == pytest.approx(363_724_800 * 1024 / (4e11 * 0.75))


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="offload_activations needs activations=keep"):
        StreamingOptions(activations="recompute", offload_activations=True)
