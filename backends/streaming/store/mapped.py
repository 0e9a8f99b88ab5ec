"""Tier `mapped`: the state file is mapped into memory, and weights are views of the map. All blocks are reserved when
the file is made, so no access to the map can run out of disk.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from weftrain.backends.streaming.store.base import UpdateRange, copy_gradients
from weftrain.backends.streaming.store.checksums import PAGE_WORDS, Running, checksum
from weftrain.backends.streaming.store.file import FileStore, as_bytes, state_sums
from weftrain.backends.streaming.store.layout import Layout, Record, Tile
from weftrain.backends.streaming.store.planes import DTYPES, Planes, planes_in

_RANGE_ELEMENTS = 1 << 19  # copied to their new place and updated there while they are in the last-level cache


class MappedStore(FileStore):
    tier = "mapped"

    def __init__(self, layout: Layout, folder: Path) -> None:
        super().__init__(layout, folder, direct=False)

    def _open(self) -> None:
        super()._open()
        self._map = mmap.mmap(self._state.descriptor, self.layout.file_bytes, mmap.MAP_SHARED)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        # tile -> the rotation at which this process wrote or verified its compute plane, and all of its planes
        self._weights_verified: dict[int, int] = {}
        self._verified: dict[int, int] = {}

    def _planes(self, tile: Tile, rotation: int) -> Planes:
        offset = self.layout.offset(tile, rotation)
        return planes_in(self._memory[offset : offset + tile.bytes], tile)

    def _gradient(self, tile: Tile) -> Tensor:
        offset = self.layout.gradient_offset(tile)
        return self._memory[offset : offset + tile.gradient_bytes].view(DTYPES[tile.gradient_dtype])

    def compute_planes(self, record: Record) -> list[Tensor]:
        found = []
        for tile in record.tiles:
            rotation, name = self.rotation(tile), tile.planes[0].name
            found.append(self._planes(tile, rotation)[name])
            if self._weights_verified.get(tile.index) != rotation:
                self._check_planes(tile, rotation, {name: found[-1]})
                self._weights_verified[tile.index] = rotation
        return found

    def updating(self, tile: Tile) -> Iterator[UpdateRange]:
        before, step, numbers = self.rotation(tile), self.committed.step, range(len(tile.planes))
        old, new = self._planes(tile, before), self._planes(tile, before + 1)
        old_sums = [Running(tile.index, number, before) for number in numbers]
        new_sums = [Running(tile.index, number, before + 1) for number in numbers]
        gradient, gradient_sum = self._gradient(tile), Running(tile.index, -1, step)
        for start in range(0, len(tile.owned), _RANGE_ELEMENTS):
            stop = min(start + _RANGE_ELEMENTS, len(tile.owned))
            parts = [slice(start // plane.elements_per_item, stop // plane.elements_per_item) for plane in tile.planes]
            for plane, part, running in zip(tile.planes, parts, old_sums, strict=True):
                source = old[plane.name][part]
                if plane.name != "copy":  # the sum is then of the copy, which is in the cache
                    source = new[plane.name][part].copy_(source)
                _add(running, source)
            yield UpdateRange(start, stop, new, gradient[start:stop])
            _add(gradient_sum, gradient[start:stop])
            for plane, part, running in zip(tile.planes, parts, new_sums, strict=True):
                _add(running, new[plane.name][part])
        for number, running in enumerate(old_sums):
            self._check(tile, before, number, running.value)
        self._check_gradient(tile, step, gradient_sum.value)
        with self._reported("written"):
            self._note_state(tile, before + 1, [running.value for running in new_sums])
        self._weights_verified[tile.index] = before + 1
        self.bytes_read += tile.bytes + tile.gradient_bytes
        self.bytes_written += tile.bytes
        self._updated(tile)

    def write_updated(self, tile: Tile, planes: Planes) -> None:
        rotation = self.rotation(tile) + 1
        target = self._planes(tile, rotation)
        for name, plane in target.items():
            plane.copy_(planes[name])
        with self._reported("written"):
            self._note_state(tile, rotation, state_sums(tile, target, rotation))
        self._weights_verified[tile.index] = rotation
        self.bytes_written += tile.bytes
        self._updated(tile)

    def read_gradient(self, tile: Tile) -> Tensor:
        step, gradient = self.committed.step, self._gradient(tile)
        self._check_gradient(tile, step, checksum(as_bytes(gradient), tile.index, -1, step))
        return gradient

    def spool(self, tile: Tile, gradients: Mapping[str, Tensor]) -> None:
        gradient, step = self._gradient(tile), self.committed.step + 1
        running = Running(tile.index, -1, step)
        for start in range(0, len(tile.owned), _RANGE_ELEMENTS):
            part = slice(start, min(start + _RANGE_ELEMENTS, len(tile.owned)))
            copy_gradients(tile, gradients, gradient, part)
            _add(running, gradient[part])
        with self._reported("written"):
            self._note_gradient(tile, running.value)
        self.bytes_written += tile.gradient_bytes

    def read_state(self, tile: Tile) -> Planes:
        rotation = self.rotation(tile)
        planes = self._planes(tile, rotation)
        if self._verified.get(tile.index) != rotation:  # an export reads a tile once for each of its tensors
            self._check_planes(tile, rotation, planes)
            self._verified[tile.index] = rotation
        return planes

    def write_state(self, tile: Tile, planes: Planes) -> None:
        target = self._planes(tile, 0)
        for name, plane in target.items():
            plane.copy_(planes[name])
        with self._reported("written"):
            self._note_state(tile, 0, state_sums(tile, target, 0))
        self._weights_verified[tile.index] = 0

    def close(self) -> None:
        with contextlib.suppress(ValueError):  # the map is closed already
            self._map.flush()
        self._memory = torch.empty(0, dtype=torch.uint8)
        super().close()


def _add(running: Running, part: Tensor) -> None:
    """`running.add`, with the pages summed by all threads that compute, since they wait meanwhile."""
    if part.nbytes % (PAGE_WORDS * 8):
        running.add(as_bytes(part))
    else:
        running.add_sums(part.view(torch.int64).view(-1, PAGE_WORDS).sum(1).numpy())
