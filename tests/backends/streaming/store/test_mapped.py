"""The tier that is mapped into memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.state import fill
from weftrain.backends.streaming.store.mapped import MappedStore
from weftrain.core.config import Recipe


def test_weights_are_views_of_the_file(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    layout = layout_of(tiny_recipe(), StreamingOptions(tier="mapped", tile_elements=4096))
    store = MappedStore(layout, tmp_path / "store")
    fill(store, lambda plane, spec: torch.ones(spec.shape), 0, 0, lambda words, share: None, set_aside=False)
    store.compute_planes(layout.records[0])[0][0] = 3.0
    tile = layout.tiles[0]
    written = (tmp_path / "store" / "state").read_bytes()[layout.offset(tile, 0) :][:8]
    assert torch.frombuffer(bytearray(written), dtype=torch.float32).tolist() == [3.0, 1.0]
    store.close()
