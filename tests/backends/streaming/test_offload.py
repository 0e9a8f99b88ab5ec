"""Activations that are kept in host memory, and the order in which they come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from streaming_runs import SIX_LAYERS, assert_same, prepare, source_of, streaming, trained

from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]


@pytest.mark.parametrize("tier", ["ram", pytest.param("direct", marks=pytest.mark.prove)])
def test_offloaded_activations_change_no_bit(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """On a CPU they are copied from memory to memory; slots are poisoned, so an offloaded weight would be stale or
    NaN.
    """
    recipe = tiny_recipe("crystal", SIX_LAYERS, "batch.micro_batch_size=2", "schedule.steps=3")
    wanted = trained(prepare(recipe, steps=3, threads=1), recipe)
    options = {"device_memory_limit_mib": 2048, "layers_on_device": 2, "poison_freed_slots": True, "threads": 1}
    run = streaming(recipe, tmp_path, tier, 3, offload_activations=True, **options)
    losses, norms, state = trained(run, recipe)
    assert (losses, norms) == wanted[:2]
    assert_same(state, wanted[2])
    run.close()


def test_what_the_next_one_needs_comes_back_while_this_one_computes(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Backward takes layers in reverse and micro-batches in order; never more than two of them are on the device."""
    recipe = tiny_recipe("crystal", "model.num_layers=3", "batch.micro_batch_size=2", "schedule.steps=1")
    run = streaming(recipe, tmp_path, "ram", 1, offload_activations=True, threads=1)
    offload, log = run.executor._offload, list[str]()
    bring, returned = offload._bring, offload._copies.returned
    where = {}

    def note(unit: tuple[int, int]) -> None:
        if unit in offload._units and unit not in offload._brought:
            log.append(f"bring {unit[0]}.{unit[1]}")
            where.update({id(held): unit for held in offload._units[unit]})
        bring(unit)

    def use(held: object) -> object:
        line = f"use {where[id(held)][0]}.{where[id(held)][1]}"
        if log[-1] != line:
            log.append(line)
        return returned(held)

    offload._bring, offload._copies.returned = note, use
    list(run.train(source_of(recipe)))
    order = ["3.0", "3.1", "2.0", "2.1", "1.0", "1.1"]
    wanted = ["bring 3.0"]
    for now, after in zip(order, [*order[1:], None], strict=True):
        wanted += [*([f"bring {after}"] if after else []), f"use {now}"]
    assert log == wanted
    assert offload._copies.held_bytes > 0
    run.close()
