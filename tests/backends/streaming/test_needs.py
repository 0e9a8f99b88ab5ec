"""What stays on a device, and how much of both memories a run needs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from weftrain.backends.streaming.needs import device_memory, needs, place
from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.placement import Placement
from weftrain.core.config import Recipe
from weftrain.core.recipe_file import load_recipe

SEVEN = ("batch.replicas=1", "batch.global_batch_size=16", "batch.micro_batch_size=4")


def placed(recipe: Recipe, available: float, **chosen: Any) -> tuple[Placement, int, int]:
    """What stays, and the bytes that host and device need."""
    options = StreamingOptions.model_validate({"activations": "recompute", **chosen})
    layout = layout_of(recipe, options)
    found = place(recipe, options, layout, "cuda", int(available))
    wanted = needs(recipe, options, layout, found, "cuda")
    return found, wanted.total_memory_bytes, wanted.total_device_bytes


def test_as_much_as_fits_evenly_spread() -> None:
    recipe = load_recipe("amber_7b", SEVEN).recipe
    found = {gigabytes: placed(recipe, gigabytes * 1e9) for gigabytes in (40, 60, 80, 100, 141)}
    for gigabytes, (placement, _, device) in found.items():
        assert device <= gigabytes * 1e9
        layers = sorted(index for index in placement.states if 0 < index < 33)
        gaps = [b - a for a, b in itertools.pairwise(layers)]
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
        if layers and len(layers) < 32:
            assert {0, 33} <= placement.states
            more = placed(recipe, 1e15, layers_on_device=len(layers) + 1, gradients_on_device=False)
            assert more[2] > gigabytes * 1e9
    kept = [len(placement.states) for placement, _, _ in found.values()]
    hosts = [host for _, host, _ in found.values()]
    assert kept == sorted(kept)
    assert hosts == sorted(hosts, reverse=True)
    # fp32 moments and masters, a bf16 copy and summed fp32 gradients: 18 bytes a parameter, wherever they are
    state = 18 * sum(record.size for record in layout_of(recipe, StreamingOptions()).records)
    (nothing, host, _), (_, rest, _) = placed(recipe, 1e12, layers_on_device=0, gradients_on_device=False), found[80]
    assert not nothing.states
    assert host == pytest.approx(state, rel=0.02)
    moved = 18 * _parameters(recipe, found[80][0].states) + 4 * _parameters(recipe, found[80][0].gradients)
    assert host - rest == pytest.approx(moved, rel=0.05)


def _parameters(recipe: Recipe, records: frozenset[int]) -> int:
    return sum(record.size for record in layout_of(recipe, StreamingOptions()).records if record.index in records)


def test_gradients_wait_on_the_device_where_no_state_fits_any_more() -> None:
    recipe = load_recipe("amber_7b", SEVEN).recipe
    on_host = placed(recipe, 80e9, layers_on_device=0, gradients_on_device=False)
    on_device = placed(recipe, 80e9, layers_on_device=0, gradients_on_device=True)
    assert len(on_device[0].gradients) == 34
    assert on_host[1] - on_device[1] == pytest.approx(4 * 6.74e9, rel=0.05)
    assert placed(recipe, 80e9)[0].gradients.isdisjoint(placed(recipe, 80e9)[0].states)
    assert not placed(recipe, 80e9, tier="mapped")[0].gradients, "a file tier keeps every gradient"


def test_the_smaller_of_limit_and_device_counts() -> None:
    assert device_memory(StreamingOptions(), "cpu") is None
    assert device_memory(StreamingOptions(device_memory_limit_mib=5), "cpu") == 5 << 20
    assert device_memory(StreamingOptions(device_memory_limit_mib=5), "cuda", 80e9) == 5 << 20
    assert device_memory(StreamingOptions(), "cuda", 80e9) == 80 * 10**9
