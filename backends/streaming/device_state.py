"""State that stays in device memory: weights, moments and gradients of some records, and gradients of others that wait
for their update.

Tier ram keeps such a state nowhere else. With a file tier the store has it too, written through at each update and not
read again, so that a step remains a transaction.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weftrain.backends.streaming.device import Copies, DeviceMemory
from weftrain.backends.streaming.placement import Placement
from weftrain.backends.streaming.store.arena import aligned
from weftrain.backends.streaming.store.base import copy_gradients
from weftrain.backends.streaming.store.layout import Layout, Record, Tile
from weftrain.backends.streaming.store.planes import DTYPES, Planes, planes_apart


class DeviceState:
    """For one store. Memory is allocated when it is first needed."""

    def __init__(self, layout: Layout, placement: Placement, memory: DeviceMemory, copies: Copies) -> None:
        self._layout, self._placement, self._memory, self._copies = layout, placement, memory, copies
        self._weights: dict[int, Tensor] = {}  # record -> its weights in the compute dtype, like a slot
        self._rest: dict[int, Tensor] = {}  # tile -> its other planes
        self._gradients: dict[int, Tensor] = {}  # tile -> flat, in the tile's gradient dtype
        self._filled: set[int] = set()  # tiles
        self._staging: Tensor | None = None  # on the host: the gradient that is being used for an update

    def keeps(self, tile: Tile) -> bool:
        """Whether the tile's state stays here."""
        return tile.record in self._placement.states

    def keeps_gradient(self, tile: Tile) -> bool:
        return self.keeps(tile) or tile.record in self._placement.gradients

    def holds(self, tile: Tile) -> bool:
        """Whether its state has been put here."""
        return tile.index in self._filled

    def weights(self, record: Record) -> Tensor:
        if record.index not in self._weights:
            size = record.compute_bytes
            self._weights[record.index] = self._memory.allocate(size, f"the weights of {record.name}")
        return self._weights[record.index]

    def all_weights(self) -> list[Tensor]:
        return list(self._weights.values())

    def planes(self, tile: Tile) -> Planes:
        record = self._layout.records[tile.record]
        first = self.weights(record)[tile.compute_offset : tile.compute_offset + tile.compute_bytes]
        if tile.index not in self._rest:
            size = tile.bytes - tile.compute_bytes
            self._rest[tile.index] = self._memory.allocate(size, f"the state of {record.name}")
        return planes_apart(tile, first, self._rest[tile.index])

    def put(self, tile: Tile, planes: Planes) -> None:
        for name, plane in self.planes(tile).items():
            plane.copy_(planes[name])
        self._filled.add(tile.index)

    def gradient(self, tile: Tile) -> Tensor:
        if tile.index not in self._gradients:
            name = self._layout.records[tile.record].name
            self._gradients[tile.index] = self._memory.allocate(tile.gradient_bytes, f"the gradient of {name}")
        return self._gradients[tile.index].view(DTYPES[tile.gradient_dtype])

    def keep_gradient(self, tile: Tile, gradients: Mapping[str, Tensor]) -> None:
        copy_gradients(tile, gradients, self.gradient(tile))

    def gradient_on_host(self, tile: Tile) -> Tensor:
        """Valid until the next call."""
        if self._staging is None or self._staging.numel() < tile.gradient_bytes:
            waiting = (item for item in self._layout.tiles if item.record in self._placement.gradients)
            self._staging = self._copies.pinned(aligned(max(item.gradient_bytes for item in waiting)))
        found = self._staging[: tile.gradient_bytes].view(DTYPES[tile.gradient_dtype])
        self._copies.fetch(self.gradient(tile), found)
        self._copies.to_host_bytes += tile.gradient_bytes
        return found

    def clear(self) -> None:
        """The store is being filled anew."""
        self._filled.clear()
