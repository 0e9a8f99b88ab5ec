"""The tier in this process's memory, and the store of a rank that holds no state."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.state import fill
from weftrain.backends.streaming.store.base import Completed, Pending
from weftrain.backends.streaming.store.ram import EmptyStore, RamStore
from weftrain.core.config import Recipe


def test_tiles_are_updated_in_place_and_in_order(tiny_recipe: Callable[..., Recipe]) -> None:
    layout = layout_of(tiny_recipe(), StreamingOptions(tile_elements=4096))
    store = RamStore(layout)
    fill(store, lambda plane, spec: torch.ones(spec.shape), 0, 0, lambda words, share: None, set_aside=False)
    for tile in layout.tiles:
        store.spool(tile, {part.name: torch.full((part.stop - part.start,), 2.0) for part in tile.fragments})
    store.complete_step(Completed(1, 1, Pending(1.0, {}, 1)))
    for tile in layout.tiles:
        assert store.needs_update(tile)
        for start, stop, planes, gradient in store.updating(tile):
            planes["weights"][start:stop] -= gradient
        assert not store.needs_update(tile)
    assert (store.committed.pending, store.committed.rotation) == (None, 1)
    first = layout.tiles[0]
    here, _ = first.owned_part(first.fragments[0])
    assert torch.equal(store.compute_planes(layout.records[0])[0][here], torch.full((here.stop - here.start,), -1.0))


def test_an_empty_store_provides_no_weights(tiny_recipe: Callable[..., Recipe]) -> None:
    layout = layout_of(tiny_recipe(), StreamingOptions())
    assert EmptyStore(layout).compute_planes(layout.records[0]) == []
