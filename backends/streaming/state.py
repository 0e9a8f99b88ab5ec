"""State in and out of a store: fp32 tensors by canonical name on one side, tiles on the other, never the whole model at
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from weftrain.backends.streaming.fabric import Alone
from weftrain.backends.streaming.store.base import DTYPES, Store
from weftrain.backends.streaming.store.layout import Piece, Tile
from weftrain.backends.streaming.store.planes import Work
from weftrain.core.backend import Job, StepResult
from weftrain.core.model import draw
from weftrain.core.parameters import ParameterSpec

PLANES = ("weights", "exp_avg", "exp_avg_sq")
Given = Callable[[str, ParameterSpec], Tensor | None]  # (plane, parameter) -> fp32, or None for zeros


def initial(job: Job) -> Given:
    """Weights that the job brings, or that are drawn from the recipe's seed; moments of zero."""

    def given(plane: str, spec: ParameterSpec) -> Tensor | None:
        if plane != "weights":
            return None
        return job.weights[spec.name] if job.weights is not None else draw(spec, job.recipe.model, job.recipe.seed)

    return given


@torch.no_grad()
def fill(
    store: Store,
    given: Given,
    step: int,
    optimizer_updates: int,
    progress: Callable[[str, float], None],
    *,
    set_aside: bool = False,
) -> None:
    """Write every tile, one after the other; each parameter is asked for once. A crash on the way leaves a store that
    holds no state.

    set_aside: a trained state that the store holds is kept under another name.
    """
    store.begin_filling(set_aside=set_aside)
    for record in store.layout.records:
        progress(f"filling the store: {record.name}", record.index / len(store.layout.records))
        specs = {spec.name: spec for spec in record.specs}
        name, tensors = "", dict.fromkeys(PLANES, torch.empty(0))
        for tile in record.tiles:
            numbers = {plane: torch.zeros(len(tile.owned), dtype=torch.float32) for plane in PLANES}
            for piece in tile.pieces:
                if piece.name != name:
                    name = piece.name
                    found = {plane: given(plane, specs[name]) for plane in PLANES}
                    tensors = {
                        plane: tensor.detach().reshape(-1) for plane, tensor in found.items() if tensor is not None
                    }
                target, source = _common(tile, piece)
                for plane, tensor in tensors.items():
                    numbers[plane][target].copy_(tensor[source])
            planes = {
                plane.name: torch.empty(_items(tile, plane.elements_per_item), dtype=DTYPES[plane.dtype])
                for plane in tile.planes
            }
            for plane in PLANES:
                if plane in planes and planes[plane].dtype == torch.float32:
                    planes[plane].copy_(numbers[plane])
            if "copy" in planes:
                planes["copy"].copy_(numbers["weights"])
            Work().save(planes, slice(0, len(tile.owned)), *(numbers[plane] for plane in PLANES))
            store.write_state(tile, planes)
    store.end_filling(step, optimizer_updates)


def result_json(result: StepResult) -> dict[str, Any]:
    """A step's result as JSON values; a number that is not finite as its name."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        number = float(value)
        return number if math.isfinite(number) else str(number)

    return {name: plain(value) for name, value in vars(result).items()}


def result_from_json(values: Mapping[str, Any] | None) -> StepResult | None:
    if values is None:
        return None
    return StepResult(**{**values, **{name: float(values[name]) for name in ("loss", "grad_norm")}})


class Reader:
    """Reads a store's state as fp32 tensors by '<plane>/<parameter>'."""

    def __init__(self, store: Store, fabric: Alone) -> None:
        self._store, self._fabric, self._work = store, fabric, Work()
        self._specs = {spec.name: spec for record in store.layout.records for spec in record.specs}
        self._tiles: dict[str, list[tuple[Tile, Piece]]] = {}
        for tile in store.layout.tiles:
            for piece in tile.pieces:
                self._tiles.setdefault(piece.name, []).append((tile, piece))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{plane}/{name}": spec.shape for plane in PLANES for name, spec in self._specs.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, whole: rank 0 of a sharded store asks the others for their parts."""
        if self._fabric.sharded:
            self._fabric.order(do="part", name=name)
        return self.part(name)

    @torch.no_grad()
    def part(self, name: str) -> Tensor:
        """This store's part of a tensor, joined with those of all ranks on rank 0."""
        plane, _, parameter = name.partition("/")
        spec = self._specs[parameter]
        found = torch.zeros(spec.size, dtype=torch.float32)
        for tile, piece in self._tiles[parameter]:
            numbers = self._work.load(self._store.read_state(tile), slice(0, len(tile.owned)))[PLANES.index(plane)]
            source, target = _common(tile, piece)
            found[target].copy_(numbers[source])
        if self._fabric.sharded:
            self._fabric.join_parts(found)
        return found.view(spec.shape)


def _common(tile: Tile, piece: Piece) -> tuple[slice, slice]:
    """The elements that a piece has in this store's part of a tile: where they lie there, and in the flattened
    parameter.
    """
    first = max(piece.offset, tile.owned.start)
    last = max(first, min(piece.offset + piece.stop - piece.start, tile.owned.stop))
    shift = piece.start - piece.offset
    return slice(first - tile.owned.start, last - tile.owned.start), slice(first + shift, last + shift)


def spooled(tile: Tile, gradients: Mapping[str, Tensor]) -> Callable[[Tensor], None]:
    """Fills a flat tensor with the gradients of this store's part of a tile."""

    def fill_target(target: Tensor) -> None:
        for piece in tile.pieces:
            to, source = _common(tile, piece)
            target[to].copy_(gradients[piece.name].reshape(-1)[source])

    return fill_target


def _items(tile: Tile, elements_per_item: int) -> int:
    return len(tile.owned) // elements_per_item
