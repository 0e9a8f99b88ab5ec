"""The tier that keeps the state in this process's memory, in one piece, and the store of a rank that keeps none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from weftrain.backends.streaming.store.arena import aligned, pinned_arena, unregister
from weftrain.backends.streaming.store.base import Store, UpdateRange, copy_gradients
from weftrain.backends.streaming.store.layout import Layout, Record, Tile
from weftrain.backends.streaming.store.planes import DTYPES, Planes, planes_in


class RamStore(Store):
    """pinned: a CUDA device copies from the memory. Without what `device_state` keeps."""

    tier = "ram"

    def __init__(self, layout: Layout, *, pinned: bool = False) -> None:
        super().__init__(layout)
        self._pinned = pinned
        self._memory: Tensor | None = None
        self._planes: dict[int, Planes] = {}
        self._gradients: dict[int, Tensor] = {}

    def _allocate(self) -> None:
        """All of it at once."""
        device = self.device_state
        states = [tile for tile in self.layout.tiles if device is None or not device.keeps(tile)]
        gradients = [tile for tile in states if device is None or not device.keeps_gradient(tile)]
        size = sum(tile.bytes for tile in states) + sum(tile.gradient_bytes for tile in gradients)
        memory = self._memory = pinned_arena(size, "the state") if self._pinned else aligned(size)
        offset = 0
        for tile in states:
            self._planes[tile.index] = planes_in(memory[offset : offset + tile.bytes], tile)
            offset += tile.bytes
        for tile in gradients:
            gradient = memory[offset : offset + tile.gradient_bytes].view(DTYPES[tile.gradient_dtype])
            self._gradients[tile.index] = gradient
            offset += tile.gradient_bytes

    def compute_planes(self, record: Record) -> list[Tensor]:
        return [self._planes[tile.index][tile.planes[0].name] for tile in record.tiles]

    def updating(self, tile: Tile) -> Iterator[UpdateRange]:
        gradient = self._gradients.get(tile.index)
        if gradient is None:
            assert self.device_state is not None
            gradient = self.device_state.gradient_on_host(tile)
        yield UpdateRange(0, len(tile.owned), self._planes[tile.index], gradient)
        self._updated(tile)

    def write_updated(self, tile: Tile, planes: Planes) -> None:
        self._updated(tile)

    def spool(self, tile: Tile, gradients: Mapping[str, Tensor]) -> None:
        copy_gradients(tile, gradients, self._gradients[tile.index])

    def read_state(self, tile: Tile) -> Planes:
        device = self.device_state
        return device.planes(tile) if device is not None and device.keeps(tile) else self._planes[tile.index]

    def write_state(self, tile: Tile, planes: Planes) -> None:
        if self.device_state is not None and self.device_state.keeps(tile):
            self.device_state.put(tile, planes)
            return
        if self._memory is None:
            self._allocate()
        for name, plane in planes.items():
            self._planes[tile.index][name].copy_(plane)

    def close(self) -> None:
        if self._pinned and self._memory is not None:
            unregister(self._memory)
        self._planes, self._gradients, self._memory = {}, {}, None


class EmptyStore(RamStore):
    """For a rank that holds no state: it receives weights and sends gradients."""

    def compute_planes(self, record: Record) -> list[Tensor]:
        return []
