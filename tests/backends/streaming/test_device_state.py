"""A device with memory of its own, for which a part of the CPU's memory stands in: what stays there, what is copied and
when, and that no bit of the results depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_runs import (
    SIX_LAYERS,
    TIERS,
    abandon_after_drain,
    assert_same,
    prepare,
    resumed,
    small,
    source_of,
    streaming,
    trained,
)

from weftrain.backends.streaming.needs import kept_device_bytes
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, NonFiniteError, OutOfMemoryError

Tiny = Callable[..., Recipe]
APART = {"device_memory_limit_mib": 2048, "poison_freed_slots": True, "threads": 1}
# what the options ask for: everything stays; nothing does; half of the layers; gradients only; a step in two formats
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all": {},
    "none": {"layers_on_device": 0, "gradients_on_device": False},
    "half": {"layers_on_device": 3, "gradients_on_device": False},
    "gradients": {"layers_on_device": 0, "gradients_on_device": True},
    "some": {"layers_on_device": 2, "activations": "recompute"},
}
_LOCAL: dict[str, tuple[list[float], list[float], State]] = {}


def local(recipe: Recipe) -> tuple[list[float], list[float], State]:
    """What the local backend makes of a recipe: computed once."""
    key = recipe.model_dump_json()
    if key not in _LOCAL:
        run = prepare(recipe, steps=4, threads=1)
        losses, norms, state = trained(run, recipe)
        held = {name: state.tensors[name] for name in state.tensors}
        _LOCAL[key] = losses, norms, State(state.step, state.optimizer_updates, held)
        run.close()
    return _LOCAL[key]


def cases() -> list[Any]:
    quick = {("ram", "half"), ("ram", "gradients"), ("direct", "some"), ("mapped", "half")}
    found = [(tier, name) for tier in TIERS for name in PLACEMENTS if tier == "ram" or name != "gradients"]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.prove) for case in found]


@pytest.mark.parametrize(("tier", "name"), cases())
def test_equals_local(tier: str, name: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Two slots for the streamed ones of six layers, and NaN in each that is free: a stale weight shows at once."""
    recipe = tiny_recipe("crystal", SIX_LAYERS, "batch.micro_batch_size=2", "optimizer.clip_norm=0.5")
    wanted = local(recipe)
    run = streaming(recipe, tmp_path, tier, 4, **APART, **PLACEMENTS[name])
    losses, norms, state = trained(run, recipe)
    assert (losses, norms) == wanted[:2]
    assert_same(state, wanted[2])
    layout, placement = run.store.layout, run.executor.placement
    assert run.executor.memory.used_bytes == kept_device_bytes(layout, placement)
    run.close()


@pytest.mark.parametrize(("tier", "form"), [("ram", "fp32"), ("ram", "int8_moments"), ("mapped", "split")])
def test_equals_a_run_without_a_device_in_bf16(tier: str, form: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe("crystal", "model.num_layers=4", "precision.compute=bfloat16", "schedule.steps=3")
    states = []
    for number, more in enumerate(({}, APART | {"layers_on_device": 2})):
        options = {"state_format": form, "threads": 1, "poison_freed_slots": False, **more}
        run = streaming(recipe, tmp_path / str(number), tier, 3, **options)
        losses, norms, state = trained(run, recipe)
        held = {name: state.tensors[name] for name in state.tensors}
        states.append((losses, norms, State(state.step, state.optimizer_updates, held)))
        run.close()
    assert states[0][:2] == states[1][:2]
    assert_same(states[1][2], states[0][2])


@pytest.mark.parametrize("tier", ["mapped", "direct"])
def test_a_crash_loses_nothing_of_what_stays_on_the_device(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """The process dies with an update pending; another one, with another placement, goes on."""
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=3, threads=1), recipe)[2]
    run = streaming(recipe, tmp_path, tier, 3, **APART, layers_on_device=2)
    steps = run.train(source_of(recipe))
    next(steps), next(steps)
    abandon_after_drain(run)
    again = {"threads": 1, "device_memory_limit_mib": 2048, "layers_on_device": 1}
    stood, state = resumed(recipe, tmp_path, tier, **again)
    assert stood == 2
    assert_same(state, wanted)


@pytest.mark.parametrize("tier", ["mapped", "direct"])
def test_a_pending_update_is_made_by_the_recipe_of_its_step(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """The process dies with an update pending, and the next one is given other optimizer settings from there on."""
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=2, threads=1), recipe)[2]
    run = streaming(recipe, tmp_path, tier, 3)
    steps = run.train(source_of(recipe))
    next(steps), next(steps)
    abandon_after_drain(run)
    optimizer = recipe.optimizer.model_copy(update={"beta2": 0.5, "weight_decay": 0.3, "eps": 1e-3})
    stood, state = resumed(recipe.model_copy(update={"optimizer": optimizer}), tmp_path, tier, 2, threads=1)
    assert stood == 2
    assert_same(state, wanted)


def test_a_weight_that_was_not_copied_shows(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """A schedule that takes a layer for one whose slot was kept: poison, or the bytes that were copied, tell."""
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path, "ram", 3, **APART, layers_on_device=0)
    original = run.executor._copy
    run.executor._copy = lambda event, *rest: None if event.record.name == "layers.1" else original(event, *rest)
    with pytest.raises((BackendError, NonFiniteError)):
        list(run.train(source_of(recipe)))
    run.close()


def test_order_of_copies(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """In backward each layer is copied before the layer after it computes, as soon as a slot is free. In forward a
    record is copied after its update, and never into a slot that is in use.
    """
    recipe = tiny_recipe("amber", SIX_LAYERS, "schedule.steps=2")
    run = streaming(recipe, tmp_path, "ram", 2, **APART, layers_on_device=0, gradients_on_device=False)
    log: list[str] = []
    copy, update = run.executor._copy, run.executor._update_record
    run.executor._copy = lambda event, *rest: (log.append(f"copy {event.record.name}"), copy(event, *rest))
    run.executor._updates._update = lambda record: (update(record), log.append(f"updated {record.name}"))
    computation = run._computation.segments
    names = [record.name for record in run.store.layout.records]
    for name, segment in zip(names, computation, strict=True):
        segment.register_forward_pre_hook(lambda *_, name=name: log.append(f"compute {name}"))
    original = run.executor.spool
    run.executor.spool = lambda record, *rest: (log.append(f"spool {record.name}"), original(record, *rest))
    list(run.train(source_of(recipe)))
    first = log[: log.index("spool embedding") + 1]
    # layers 4 and 5 of 0 to 5 are still in the two slots when backward begins
    assert first[first.index("spool layers.5") :] == [
        *("spool layers.5", "copy layers.3", "spool layers.4", "copy layers.2", "spool layers.3"),
        *("copy layers.1", "spool layers.2", "copy layers.0", "spool layers.1", "spool layers.0", "spool embedding"),
    ]
    second = log[len(first) :]
    for name in names:
        assert second.index(f"updated {name}") < second.index(f"copy {name}") < second.index(f"compute {name}")
    assert [item for item in second if item.startswith("updated")][: len(names)] == [f"updated {n}" for n in names]
    run.close()


def test_micro_batches_share_a_visit(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """The same bytes for one micro-batch and for four, on every tier."""
    for tier in TIERS:
        moved = []
        for micro in (4, 1):
            recipe = tiny_recipe("amber", f"batch.micro_batch_size={micro}", "schedule.steps=2")
            options = APART | {"layers_on_device": 0, "gradients_on_device": False if tier == "ram" else None}
            run = streaming(recipe, tmp_path / f"{tier}{micro}", tier, 2, **options)
            list(run.train(source_of(recipe)))
            moved.append((run.stats()["to_device_bytes"], run.stats()["to_host_bytes"]))
            run.close()
        assert moved[0] == moved[1]


def test_what_does_not_fit_the_device_is_refused(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    with pytest.raises(BackendError, match=r"of device memory \(.*one block at work.*activations=recompute"):
        streaming(recipe, tmp_path, "ram", device_memory_limit_mib=16)
    with pytest.raises(BackendError, match="the model has 3 layers"):
        streaming(recipe, tmp_path, "ram", device_memory_limit_mib=2048, layers_on_device=4)
    with pytest.raises(BackendError, match="with its own memory"):
        streaming(recipe, tmp_path, "ram", layers_on_device=1)
    run = streaming(recipe, tmp_path, "ram", device_memory_limit_mib=2048, layers_on_device=0)
    with pytest.raises(OutOfMemoryError, match="out of device memory: a buffer needs"):
        run.executor.memory.allocate(1 << 40, "a buffer")
    assert torch.isfinite(next(run.train(source_of(recipe))).loss)
    run.close()


def test_an_allocation_that_fails_in_a_step_is_one_line(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """And the store still stands at the step before."""
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path, "mapped", 3, **APART, layers_on_device=1)
    steps = run.train(source_of(recipe))
    next(steps)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nand more")

    run._computation.segments[-1].register_forward_pre_hook(fail)
    with pytest.raises(
        OutOfMemoryError, match=r"out of memory in a step, .*largest parts.*activations=recompute"
    ) as told:
        next(steps)
    assert "\n" not in str(told.value)
    assert run.store.committed.step == 1
    run.close()


@pytest.mark.parametrize("tier", ["ram", "mapped"])
def test_an_imported_state_replaces_what_stays_on_the_device(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path / "first", tier, 2, **APART, layers_on_device=2)
    start = run.export_state()
    begun = State(start.step, start.optimizer_updates, {name: start.tensors[name].clone() for name in start.tensors})
    first = trained(run, recipe)
    run.import_state(begun)
    again = trained(run, recipe)
    assert again[:2] == first[:2]
    assert first[0][0] != first[0][1]
    run.close()
