"""State in and out of a store: from and to fp32 tensors by canonical name, never the whole model at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.backends.common.decoder import PLANES, initial_weight
from weftrain.backends.streaming.communicator import Communicator
from weftrain.backends.streaming.store.base import Store
from weftrain.backends.streaming.store.layout import Fragment, Tile
from weftrain.backends.streaming.store.planes import DTYPES, Planes, UpdateBuffers, split
from weftrain.core.backend import Job
from weftrain.core.parameters import ParameterSpec

Progress = Callable[[str, float], None]
TensorSource = Callable[[str, ParameterSpec], Tensor | None]  # (plane, parameter) -> fp32, or None for zeros


def initial_tensors(job: Job) -> TensorSource:
    """Weights that the job brings, or that are drawn from the recipe's seed; moments of zero."""

    def tensor(plane: str, spec: ParameterSpec) -> Tensor | None:
        if plane != "weights":
            return None
        return initial_weight(job, spec)

    return tensor


@torch.no_grad()
def fill(
    store: Store, source: TensorSource, step: int, optimizer_updates: int, progress: Progress, *, set_aside: bool
) -> None:
    """Write every tile; each parameter is requested once. A crash midway leaves a store that holds no state. set_aside:
    see Store.begin_filling.
    """
    store.begin_filling(set_aside=set_aside)
    for record in store.layout.records:
        progress(f"filling the store: {record.name}", record.index / len(store.layout.records))
        specs = {spec.name: spec for spec in record.specs}
        name, tensors = "", dict.fromkeys(PLANES, torch.empty(0))
        for tile in record.tiles:
            fp32 = {plane: torch.zeros(len(tile.owned)) for plane in (PLANES if tile.trained else PLANES[:1])}
            for fragment in tile.fragments:
                if fragment.name != name:
                    name = fragment.name
                    found = {plane: source(plane, specs[name]) for plane in fp32 if plane in specs[name].planes}
                    tensors = {plane: item.detach().reshape(-1) for plane, item in found.items() if item is not None}
                here, there = tile.owned_part(fragment)
                for plane, tensor in tensors.items():
                    fp32[plane][here].copy_(tensor[there])
            store.write_state(tile, _planes(tile, fp32))
    store.end_filling(step, optimizer_updates)


def _planes(tile: Tile, fp32: dict[str, Tensor]) -> Planes:
    """A tile's planes from the fp32 weights and moments of its owned elements, which are overwritten."""
    planes = {
        plane.name: torch.empty(len(tile.owned) // plane.elements_per_item, dtype=DTYPES[plane.dtype])
        for plane in tile.planes
    }
    for name in fp32:
        if name in planes and planes[name].dtype == torch.float32:
            planes[name].copy_(fp32[name])
    if "copy" in planes:
        planes["copy"].copy_(fp32["weights"])
    if not tile.trained:
        if "weights" not in planes:
            split(fp32["weights"], planes["high"], planes["low"])
        return planes
    UpdateBuffers().save(planes, slice(0, len(tile.owned)), *(fp32[name] for name in PLANES))
    return planes


class StateReader:
    """Reads a store's state as fp32 tensors by '<plane>/<parameter>'."""

    def __init__(self, store: Store, communicator: Communicator) -> None:
        self._store, self._communicator, self._buffers = store, communicator, UpdateBuffers()
        self._specs = {spec.name: spec for record in store.layout.records for spec in record.specs}
        self._tiles: dict[str, list[tuple[Tile, Fragment]]] = {}
        for tile in store.layout.tiles:
            for fragment in tile.fragments:
                self._tiles.setdefault(fragment.name, []).append((tile, fragment))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            f"{plane}/{name}": spec.shape
            for plane in PLANES
            for name, spec in self._specs.items()
            if plane in spec.planes
        }

    def read(self, name: str) -> Tensor:
        """For rank 0: one tensor, whole, with the parts that other ranks own."""
        self._communicator.command_owners(do="part", name=name)
        return self.part(name)

    @torch.no_grad()
    def part(self, name: str) -> Tensor:
        """This store's part of a tensor, joined on rank 0 with the parts of all ranks."""
        plane, _, parameter = name.partition("/")
        found = torch.zeros(self._specs[parameter].size, dtype=torch.float32)
        for tile, fragment in self._tiles[parameter]:
            planes, everything = self._store.read_state(tile), slice(0, len(tile.owned))
            if plane == "weights":
                fp32 = self._buffers.load_weights(planes, everything)
            else:
                fp32 = self._buffers.load(planes, everything)[PLANES.index(plane)]
            here, there = tile.owned_part(fragment)
            found[there].copy_(fp32[here])
        return self._communicator.join_parts(found).view(self._specs[parameter].shape)
