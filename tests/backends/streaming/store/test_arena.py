"""Host memory in one registered piece, with a CUDA library that a stub stands for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.state import fill
from weftrain.backends.streaming.store import arena
from weftrain.backends.streaming.store.ram import RamStore
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Address and size of each piece that is registered."""
    found: list[tuple[int, int]] = []

    def register(address: int, size: int, flags: int) -> int:
        found.append((address, size))
        return 0

    def unregister(address: int) -> int:
        found.remove(next(item for item in found if item[0] == address))
        return 0

    library = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    return found


def test_a_state_is_registered_once_and_takes_what_it_holds(
    registered: list[tuple[int, int]], tiny_recipe: Callable[..., Recipe]
) -> None:
    """torch's allocator would round each of its tensors up to a power of two."""
    layout = layout_of(tiny_recipe(), StreamingOptions())
    store = RamStore(layout, pinned=True)
    fill(store, lambda plane, spec: torch.ones(spec.shape), 0, 0, lambda words, share: None, set_aside=False)
    wanted = sum(tile.bytes + tile.gradient_bytes for tile in layout.tiles)
    assert [size for _, size in registered] == [wanted]
    start, end = registered[0][0], registered[0][0] + wanted
    for tile in layout.tiles:
        for plane in store.read_state(tile).values():
            assert start <= plane.data_ptr() <= plane.data_ptr() + plane.nbytes <= end
    store.close()
    assert not registered


def test_memory_that_shrinks_is_one_line(registered: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([5 << 20, 3 << 20, 1 << 20])
    monkeypatch.setattr(arena, "_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(arena, "_RESERVE_BYTES", 1 << 20)
    monkeypatch.setattr(arena.psutil, "virtual_memory", lambda: SimpleNamespace(available=next(left)))
    with pytest.raises(
        BackendError, match=r"shrank .* for the state: 0.00195 GiB of 0.00391 GiB.*tier=direct"
    ) as caught:
        arena.pinned_arena(4 << 20, "the state")
    assert "\n" not in str(caught.value)
    assert not registered


def test_a_refusal_is_a_warning_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 801))
    with pytest.warns(UserWarning, match=r"could not be pinned \(CUDA error 801\).*ulimit -l"):
        memory = arena.pinned_arena(1 << 20, "the state")
    assert memory.numel() == 1 << 20
