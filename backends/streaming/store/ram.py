"""The tier that keeps the state in tensors of this process, and the store of a rank that keeps none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from weftrain.backends.streaming.store.base import Store, UpdateRange, copy_gradients
from weftrain.backends.streaming.store.layout import Layout, Record, Tile
from weftrain.backends.streaming.store.planes import DTYPES, Planes


class RamStore(Store):
    tier = "ram"

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._planes: dict[int, Planes] = {}
        self._gradients: dict[int, Tensor] = {}

    def compute_planes(self, record: Record) -> list[Tensor]:
        return [self._planes[tile.index][tile.planes[0].name] for tile in record.tiles]

    def updating(self, tile: Tile) -> Iterator[UpdateRange]:
        yield UpdateRange(0, len(tile.owned), self._planes[tile.index], self._gradients[tile.index])
        self._updated(tile)

    def spool(self, tile: Tile, gradients: Mapping[str, Tensor]) -> None:
        if tile.index not in self._gradients:
            self._gradients[tile.index] = torch.zeros(len(tile.owned), dtype=DTYPES[tile.gradient_dtype])
        copy_gradients(tile, gradients, self._gradients[tile.index])

    def read_state(self, tile: Tile) -> Planes:
        return self._planes[tile.index]

    def write_state(self, tile: Tile, planes: Planes) -> None:
        if tile.index not in self._planes:
            pinned = torch.cuda.is_available()  # copies to a device then run beside its computation
            self._planes[tile.index] = {
                name: torch.empty(plane.shape, dtype=plane.dtype, pin_memory=pinned) for name, plane in planes.items()
            }
        for name, plane in planes.items():
            self._planes[tile.index][name].copy_(plane)

    def close(self) -> None:
        self._planes, self._gradients = {}, {}


class EmptyStore(RamStore):
    """For a rank that holds no state: it receives weights and sends gradients."""

    def compute_planes(self, record: Record) -> list[Tensor]:
        return []
