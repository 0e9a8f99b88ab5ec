"""The tier past the page cache."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_injection import Death, Faults, injected
from streaming_runs import abandon, assert_same, prepare, resumed, small, source_of, streaming, trained

from weftrain.backends.streaming.store import direct as direct_store
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats import fsops

Tiny = Callable[..., Recipe]


def test_a_file_system_without_direct_io_is_named(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, path: Path, action: Callable[[], Any]) -> Any:
        if name == "open" and path.name == "state":
            raise OSError(22, "Invalid argument", str(path))
        return action()

    monkeypatch.setattr(fsops, "_perform", refuse)
    with pytest.raises(BackendError, match=r"no direct I/O: take backend\.options\.tier=mapped"):
        streaming(small(tiny_recipe), tmp_path, "direct")


def test_an_interrupted_filling_holds_no_state(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=3), recipe)[2]
    for at in range(6, 30, 4):
        folder = tmp_path / str(at)
        with injected(Faults("dies after", at)), pytest.raises(Death):
            abandon(streaming(recipe, folder, "direct"))
        stood, state = resumed(recipe, folder, "direct")
        assert stood == 0
        assert_same(state, wanted)


def test_a_slow_disk_is_reported_and_waited_for(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=1), recipe)[2]
    monkeypatch.setattr(direct_store, "STALL_WARNING_S", 0.05)
    run = streaming(recipe, tmp_path, "direct", 1)
    slept = []

    def slow(name: str, path: Path, action: Callable[[], Any]) -> Any:
        if name == "read" and not slept:
            slept.append(name)
            while not any("waited for" in str(item.message) for item in seen):  # however busy the machine is
                time.sleep(0.01)
            time.sleep(0.25)
        return action()

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        patch.setattr(fsops, "_perform", slow)
        list(run.train(source_of(recipe)))
    assert any("waited for embedding to be read: the disk is slow or hangs" in str(item.message) for item in seen)
    assert run.stats()["stall_ms"] > 200
    assert_same(run.export_state(), wanted)
    run.close()


def test_buffers_are_reused_and_limited() -> None:
    pool = direct_store._Pool(8192)
    first = pool.acquire(8192)
    address = first.data_ptr()
    pool.release(first)
    again = pool.acquire(5000)  # a buffer of up to twice the size serves
    assert (again.data_ptr(), again.numel()) == (address, 5000)
    pool.fail(BackendError("closed"))
    with pytest.raises(BackendError, match="closed"):  # it would exceed the limit, and nothing will be released
        pool.acquire(8192)


def test_buffers_are_handed_out_in_the_order_of_the_requests() -> None:
    """A later read that took the last buffer would keep it from the earlier one, which the run waits for."""
    pool = direct_store._Pool(4096)
    held, earlier, later = pool.acquire(4096), pool.ticket(), pool.ticket()
    with ThreadPoolExecutor(1) as thread:
        second = thread.submit(pool.acquire, 4096, later)
        pool.release(held)
        assert not wait([second], 0.1).done  # the buffer is free, and kept for the earlier request
        buffer = pool.acquire(4096, earlier)
        pool.release(buffer)
        assert second.result(5).data_ptr() == buffer.data_ptr()


def test_a_write_of_state_waits_for_what_is_being_read(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path, "direct", 2)
    store, steps = run.store, run.train(source_of(recipe))
    next(steps)
    tile = store.layout.tiles[0]
    with store._reading(tile):
        slot = run.executor._slot(store.layout.records[0])
        store.drop_ahead()
        store.prefetch(store.layout.records[0], slot, True)
        with torch.no_grad():
            for _ in store.updating(tile):
                pass
        time.sleep(0.05)
        assert not store._writes[tile.index].done()
        slot.fill_(0xFF)  # the slot is free at once: what is written was copied
    store._writes[tile.index].result(5)
    assert not torch.isnan(store.read_state(tile)[tile.planes[0].name]).any()
    run.close()
