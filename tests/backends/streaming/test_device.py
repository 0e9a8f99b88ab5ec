"""Copies on streams of their own, watched on streams that only keep time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_cuda
import pytest
import torch
from streaming_runs import SIX_LAYERS, assert_same, prepare, streaming, trained

from weftrain.backends.streaming.device import CudaCopies, DeviceMemory
from weftrain.core.config import Recipe
from weftrain.core.errors import OutOfMemoryError

Tiny = Callable[..., Recipe]
APART = {"device_memory_limit_mib": 2048, "layers_on_device": 1, "threads": 1, "gradients_on_device": None}


@pytest.mark.parametrize(
    ("family", "tier", "offload"),
    [("amber", "ram", True), ("amber", "direct", False), ("amber", "mapped", False), ("moe", "ram", False)],
)
def test_no_access_overtakes_another(
    family: str, tier: str, offload: bool, tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three steps on the CUDA code path: no slot is overwritten before it was used, none used before it is filled,
    and the same of the host memory at the other end. And no bit differs.
    """
    few_tokens = ["batch.global_batch_size=2", "batch.micro_batch_size=1", "model.experts.count=32"]
    more = few_tokens if family == "moe" else ["batch.micro_batch_size=2"]
    recipe = tiny_recipe(family, SIX_LAYERS, *more, "schedule.steps=3")
    wanted = trained(prepare(recipe, steps=3, threads=1), recipe)
    watch = fake_cuda.use(monkeypatch)
    options = APART | {"gradients_on_device": False} if tier == "ram" else APART
    run = streaming(recipe, tmp_path, tier, 3, offload_activations=offload, **options)
    fake_cuda.watch_run(run, watch, monkeypatch)
    losses, norms, state = trained(run, recipe)
    assert not watch.races, watch.races[:5]
    assert (losses, norms) == wanted[:2]
    assert_same(state, wanted[2])
    kinds = {memory[0] for memory in watch.accesses}
    assert {"slot", "gradient", "gradient on the host"} <= kinds
    run.close()


@pytest.mark.parametrize("missing", ["used", "wait_for_copy", "finish"])
def test_a_wait_that_is_left_out_is_seen(
    missing: str, tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("amber", SIX_LAYERS, "schedule.steps=2")
    watch = fake_cuda.use(monkeypatch)
    monkeypatch.setattr(CudaCopies, missing, lambda *_: None)
    run = streaming(recipe, tmp_path, "ram", 2, **APART | {"gradients_on_device": False})
    fake_cuda.watch_run(run, watch, monkeypatch)
    trained(run, recipe)
    assert watch.races
    run.close()


def test_device_memory_is_counted() -> None:
    memory = DeviceMemory(torch.device("cpu"), 100)
    assert not memory.allocate(60, "a slot").any()
    with pytest.raises(OutOfMemoryError, match=r"out of device memory: another slot needs .*layers_on_device to fewer"):
        memory.allocate(60, "another slot")
    assert memory.used_bytes == 60
