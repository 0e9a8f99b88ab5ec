"""What a run needs and how long a step takes, and what the outline draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from families import FAMILIES
from streaming_runs import saved_by_a_block

from weftrain.backends.streaming.needs import kept_by_a_block, needs, remedies
from weftrain.backends.streaming.options import StreamingOptions, layer_slots, layout_of
from weftrain.backends.streaming.placement import Placement
from weftrain.backends.streaming.planner import predict
from weftrain.core.config import Recipe
from weftrain.core.prediction import Needs, Speeds
from weftrain.core.recipe_file import load_recipe


def options(**chosen: Any) -> StreamingOptions:
    return StreamingOptions.model_validate({"tile_elements": 4096, **chosen})


def needed(recipe: Recipe, chosen: StreamingOptions) -> Needs:
    layout = layout_of(recipe, chosen)
    return needs(recipe, chosen, layout, Placement(layer_slots(recipe, chosen)))


def test_needs_follow_the_options() -> None:
    recipe = load_recipe("bench_70m", ["precision.compute=float32"]).recipe

    def total(**chosen: Any) -> int:
        chosen_options = StreamingOptions.model_validate({"buffer_mib": 64, **chosen})
        return needed(recipe, chosen_options).total_memory_bytes

    assert total(tier="direct") < total(tier="ram") - 600e6
    assert total(tier="direct", activations="recompute") < total(tier="direct")
    assert total(tier="direct", layer_slots=2) < total(tier="direct", layer_slots=6)
    assert needed(recipe, options()).disk_bytes == 0
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


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_keeps_more_of_a_block_than_is_counted(name: str, tiny_recipe: Callable[..., Recipe]) -> None:
    """And none keeps much less, so that the count follows heads, their size and the feed-forward."""
    recipe = tiny_recipe("amber")
    recipe = recipe.model_copy(update={"model": FAMILIES[name].ours})
    share = saved_by_a_block(recipe) / (8 * 13 * kept_by_a_block(recipe.model, 13, 4))
    assert 0.75 < share <= 1
