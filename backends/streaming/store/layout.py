"""Where everything lies in the store, computed from the recipe alone: records, tiles, planes and byte offsets. No
tensor and no torch.

    record   what is loaded together: the embedding, one layer, the final norm with an untied head
    tile     what is read, updated and written at once: whole tensors of a record, or an equal part of a large one
    plane    one kind of number for all elements of a tile (weights, exp_avg, ...); the first is the weights in the
             compute dtype

An updated tile is never written where it was. Tiles of one size form a class of n, with n + 1 places; after u updates
tile k of the class lies in place (k - u) mod (n + 1). So update u + 1 of tile 0 goes to the free place, that of tile 1
to where tile 0 was, and so on: one spare place makes every update of every tile a copy beside the old one, and the
number of tiles updated so far (`cursor`) is all that a restart after a crash needs to know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from weftrain.core.config import Recipe
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.optim import GROUP_OF_ROLE
from weftrain.core.parameters import ParameterSpec, Role, parameter_specs

PAGE_BYTES = 4096  # direct I/O wants memory, offset and length in multiples of it
GRANULE = 4096  # elements: each plane of a tile then ends on a page, whatever its dtype
ALIGNMENT = 32  # elements between tensors of a tile: 64 bytes of bf16, as torch allocates
MOMENT_BLOCK = 256  # elements that share one scale in 8-bit moments
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1}

FormatName = Literal["fp32", "split", "bf16_moments", "int8_moments"]


@dataclass(frozen=True)
class Plane:
    """One kind of number of a tile: `dtype`, one for each `elements_per_item` elements."""

    name: str
    dtype: str
    elements_per_item: int = 1

    def bytes(self, elements: int) -> int:
        return elements // self.elements_per_item * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StateFormat:
    """What is kept of a parameter. `exact`: in words, what of ordinary training it reproduces bit for bit."""

    name: FormatName
    exact: str
    split: bool  # a bf16 tile keeps a weight as high plane (bf16) and low plane (the rest of fp32)
    moments: tuple[Plane, ...]

    def planes(self, compute: str) -> tuple[Plane, ...]:
        """Planes, in order, of a tile that computes in `compute`; the first is what forward and backward read."""
        if compute == "float32":
            master: tuple[Plane, ...] = (Plane("weights", "float32"),)
        elif self.split:
            master = (Plane("high", "bfloat16"), Plane("low", "int16"))
        else:
            master = (Plane("copy", "bfloat16"), Plane("weights", "float32"))
        return master + self.moments

    def bytes_per_parameter(self, compute: str) -> float:
        return sum(ITEM_BYTES[plane.dtype] / plane.elements_per_item for plane in self.planes(compute))


_FP32_MOMENTS = (Plane("exp_avg", "float32"), Plane("exp_avg_sq", "float32"))
_BF16_MOMENTS = (Plane("exp_avg", "bfloat16"), Plane("exp_avg_sq", "bfloat16"))
_INT8_MOMENTS = (
    Plane("exp_avg", "int8"),
    Plane("exp_avg_root", "uint8"),  # sqrt(exp_avg_sq): half the exponent range, so that eight bits reach further
    Plane("exp_avg_scale", "float32", MOMENT_BLOCK),
    Plane("exp_avg_root_scale", "float32", MOMENT_BLOCK),
)
_EXACT = "weights, moments and every step, bit for bit"
_TIES = (
    "weights and moments, bit for bit; a bf16 weight exactly between two neighbours rounds away from zero, not to even"
)
_BF16 = "weights alone; moments are rounded to bf16 at each update"
_INT8 = "weights alone; moments are rounded to 8 bits at each update"
FORMATS: dict[str, StateFormat] = {
    "fp32": StateFormat("fp32", _EXACT, False, _FP32_MOMENTS),
    "split": StateFormat("split", _TIES, True, _FP32_MOMENTS),
    "bf16_moments": StateFormat("bf16_moments", _BF16, True, _BF16_MOMENTS),
    "int8_moments": StateFormat("int8_moments", _INT8, True, _INT8_MOMENTS),
}


@dataclass(frozen=True)
class Piece:
    """Elements start..stop of one parameter (flattened), at element `offset` of its tile."""

    name: str
    group: str  # parameter group
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Tile:
    """`index` counts over the whole store, in the order of updates."""

    index: int
    record: int
    compute: str
    pieces: tuple[Piece, ...]
    elements: int  # padding included
    owned: range  # elements whose state this store keeps: all of them, or one of N equal parts
    planes: tuple[Plane, ...]
    gradient_dtype: str
    compute_offset: int  # bytes from the start of the record's weights in the compute dtype

    @cached_property
    def compute_bytes(self) -> int:
        return self.planes[0].bytes(len(self.owned))

    @cached_property
    def bytes(self) -> int:
        total = sum(-(-plane.bytes(len(self.owned)) // 64) * 64 for plane in self.planes)
        return -(-total // PAGE_BYTES) * PAGE_BYTES

    @cached_property
    def gradient_bytes(self) -> int:
        return len(self.owned) * ITEM_BYTES[self.gradient_dtype]

    @property
    def slot_offset(self) -> int:
        """Bytes from the start of the record's slot to the owned weights."""
        return self.compute_offset + self.owned.start // max(len(self.owned), 1) * self.compute_bytes

    def plane_offsets(self) -> dict[str, tuple[int, Plane]]:
        """plane -> (byte offset in the tile, plane)."""
        offsets, offset = {}, 0
        for plane in self.planes:
            offsets[plane.name] = (offset, plane)
            offset += -(-plane.bytes(len(self.owned)) // 64) * 64
        return offsets

    def owned_part(self, piece: Piece) -> tuple[slice, slice]:
        """The owned elements of a piece: their place among the tile's owned ones, and in the flattened parameter."""
        first = max(piece.offset, self.owned.start)
        last = max(first, min(piece.offset + piece.stop - piece.start, self.owned.stop))
        shift = piece.start - piece.offset
        return slice(first - self.owned.start, last - self.owned.start), slice(first + shift, last + shift)


@dataclass(frozen=True)
class Record:
    """What is loaded together. `name`: 'embedding', 'layers.0', ..., 'head'."""

    index: int
    name: str
    specs: tuple[ParameterSpec, ...]
    tiles: tuple[Tile, ...]

    @property
    def size(self) -> int:
        return sum(spec.size for spec in self.specs)

    @property
    def compute_bytes(self) -> int:
        """Bytes of the whole record's weights in the compute dtype, padding included."""
        last = self.tiles[-1]
        return last.compute_offset + last.planes[0].bytes(last.elements)


@dataclass(frozen=True)
class Layout:
    """All records of one store. shard (r, N): this store keeps part r of N of every tile."""

    records: tuple[Record, ...]
    format: StateFormat
    shard: tuple[int, int]
    identity: dict[str, Any]

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        return tuple(tile for record in self.records for tile in record.tiles)

    @cached_property
    def _places(self) -> tuple[list[tuple[int, int, int]], list[int], int, int]:
        """For each tile (start of its class, number in it, places in it); gradient offsets; bytes of both areas."""
        members: dict[int, list[int]] = {}
        for tile in self.tiles:
            members.setdefault(tile.bytes, []).append(tile.index)
        places, start = [(0, 0, 0)] * len(self.tiles), 0
        for size, indices in members.items():
            for number, index in enumerate(indices):
                places[index] = (start, number, len(indices) + 1)
            start += size * (len(indices) + 1)
        gradients, at = [], 0
        for tile in self.tiles:
            gradients.append(start + at)
            at += tile.gradient_bytes
        return places, gradients, start, at

    @property
    def state_bytes(self) -> int:
        return self._places[2]

    @property
    def gradient_bytes(self) -> int:
        return self._places[3]

    @property
    def file_bytes(self) -> int:
        return self.state_bytes + self.gradient_bytes

    def offset(self, tile: Tile, rotation: int) -> int:
        """Byte offset of a tile's state after `rotation` updates of it."""
        start, number, places = self._places[0][tile.index]
        return start + (number - rotation) % places * tile.bytes

    def gradient_offset(self, tile: Tile) -> int:
        return self._places[1][tile.index]

    @cached_property
    def _first_places(self) -> tuple[list[int], int]:
        """For each tile the number, over the whole store, of its class's first place; and how many places there are."""
        starts = sorted({(start, places) for start, _, places in self._places[0]})
        numbers, count = {}, 0
        for start, places in starts:
            numbers[start] = count
            count += places
        return [numbers[start] for start, _, _ in self._places[0]], count

    @property
    def num_places(self) -> int:
        """Places for a tile's state: one more than there are tiles for each size of tiles."""
        return self._first_places[1]

    def place(self, tile: Tile, rotation: int) -> int:
        """The number, from 0, of the place at `offset(tile, rotation)`."""
        _, number, places = self._places[0][tile.index]
        return self._first_places[0][tile.index] + (number - rotation) % places

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(canonical_json(self.identity)).hexdigest()


def ahead_tiles(record: Record, buffer_bytes: int) -> list[Tile]:
    """The tiles whose state is read ahead: what half of the buffers hold, so that the rest gets through."""
    found, held = [], 0
    for tile in record.tiles:
        held += tile.bytes - tile.compute_bytes + tile.gradient_bytes
        if held > buffer_bytes // 2:
            break
        found.append(tile)
    return found


def make_layout(
    recipe: Recipe,
    state_format: FormatName,
    *,
    split_above: int | None,
    tile_elements: int,
    shard: tuple[int, int] = (0, 1),
) -> Layout:
    """The layout of a recipe's store.

    tile_elements: a tile takes tensors until it holds so many. split_above: a larger tensor is cut into tiles of this
    many elements; None: never (weights that are used in the store's memory must be contiguous).
    """
    form, world = FORMATS[state_format], shard[1]
    micro_batches = recipe.batch.global_batch_size // recipe.batch.micro_batch_size
    groups: list[tuple[str, list[ParameterSpec]]] = []
    for spec in parameter_specs(recipe.model):
        name = ".".join(spec.name.split(".")[: 2 if spec.name.startswith("layers.") else 1])
        name = "embedding" if name == "embedding" else name if name.startswith("layers.") else "head"
        if not groups or groups[-1][0] != name:
            groups.append((name, []))
        groups[-1][1].append(spec)
    granule = GRANULE * world
    limit = None if split_above is None else max(granule, split_above // granule * granule)
    records: list[Record] = []
    count = 0
    for number, (name, specs) in enumerate(groups):
        tiles: list[Tile] = []
        offset = 0
        for compute, pieces in _cut(specs, recipe.precision.compute, tile_elements, limit):
            elements = -(-(pieces[-1].offset + pieces[-1].stop - pieces[-1].start) // granule) * granule
            share = elements // world
            owned = range(shard[0] * share, (shard[0] + 1) * share)
            gradient_dtype = "float32" if micro_batches > 1 else compute
            planes = form.planes(compute)
            tiles.append(Tile(count, number, compute, tuple(pieces), elements, owned, planes, gradient_dtype, offset))
            offset += planes[0].bytes(elements)
            count += 1
        records.append(Record(number, name, tuple(specs), tuple(tiles)))
    identity = {
        "version": 2,
        "model": recipe.model.model_dump(mode="json"),
        "compute": recipe.precision.compute,
        "format": state_format,
        "accumulated": micro_batches > 1,
        "tile_elements": tile_elements,
        "split_above": limit,
        "shard": list(shard),
    }
    return Layout(tuple(records), form, shard, identity)


def _cut(
    specs: Sequence[ParameterSpec], compute: str, tile_elements: int, limit: int | None
) -> list[tuple[str, list[Piece]]]:
    """(compute dtype, pieces) of each tile of a record: small tensors together, norms apart from what computes in bf16,
    large ones last.
    """
    found: list[tuple[str, list[Piece]]] = []
    large = [spec for spec in specs if limit is not None and spec.size > limit]
    small = [spec for spec in specs if spec not in large]
    filled = 0
    for spec in sorted(small, key=lambda spec: _dtype(spec, compute) != "float32"):
        dtype, group = _dtype(spec, compute), GROUP_OF_ROLE[spec.role]
        if not found or found[-1][0] != dtype or filled + spec.size > tile_elements:
            found.append((dtype, []))
            filled = 0
        found[-1][1].append(Piece(spec.name, group, 0, spec.size, filled))
        filled += -(-spec.size // ALIGNMENT) * ALIGNMENT
    for spec in large:
        assert limit is not None
        for start in range(0, spec.size, limit):
            piece = Piece(spec.name, GROUP_OF_ROLE[spec.role], start, min(start + limit, spec.size), 0)
            found.append((_dtype(spec, compute), [piece]))
    return found


def _dtype(spec: ParameterSpec, compute: str) -> str:
    return "float32" if spec.role in (Role.NORM_WEIGHT, Role.NORM_BIAS) else compute
