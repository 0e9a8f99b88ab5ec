"""The layout of a store, computed from the recipe alone: records, tiles, planes and byte offsets. No torch.

    record     what is loaded together: the embedding, one layer, the final norm with an untied head
    tile       what is read, updated and written at once: whole tensors of a record, or an equal part of a large one
    fragment   the elements of one parameter that lie in a tile
    plane      one kind of number for all elements of a tile (state_format.py); the first is the weights in the compute
               dtype

An updated tile is never written where it was. Tiles of one size form a class of n, with n + 1 places; after u updates
tile k of the class lies in place (k - u) mod (n + 1). So update u + 1 of tile 0 goes to the free place, that of tile 1
to where tile 0 was, and so on: one spare place makes every update of every tile a copy beside the old one, and the
number of tiles updated so far (`cursor`) is all that a restart after a crash needs to know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from weftrain.backends.streaming.store.state_format import FORMATS, ITEM_BYTES, FormatName, Plane, StateFormat
from weftrain.core.config import Recipe
from weftrain.core.optim import GROUP_OF_ROLE
from weftrain.core.parameters import ParameterSpec, Role, parameter_specs

PAGE_BYTES = 4096  # direct I/O requires memory, offset and length in multiples of it
GRANULE = 4096  # elements: each plane of a tile then ends on a page, whatever its dtype
ALIGNMENT = 32  # elements between tensors of a tile: 64 bytes of bf16, as torch allocates
_PLANE_BYTES = 64  # planes of a tile begin at multiples of it


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Fragment:
    """Elements start..stop of one parameter (flattened), at element `offset` of its tile."""

    name: str
    group: str  # parameter group
    start: int
    stop: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.stop - self.start


@dataclass(frozen=True)
class Tile:
    """`index` counts over the whole store, in the order of updates."""

    index: int
    record: int
    compute: str
    fragments: tuple[Fragment, ...]
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
        return _round_up(self._plane_ends[-1], PAGE_BYTES)

    @cached_property
    def gradient_bytes(self) -> int:
        return len(self.owned) * ITEM_BYTES[self.gradient_dtype]

    @property
    def slot_offset(self) -> int:
        """Bytes from the start of the record's slot to the owned weights."""
        return self.compute_offset + self.owned.start // max(len(self.owned), 1) * self.compute_bytes

    @cached_property
    def _plane_ends(self) -> list[int]:
        sizes = (_round_up(plane.bytes(len(self.owned)), _PLANE_BYTES) for plane in self.planes)
        return list(accumulate(sizes, initial=0))

    def plane_offsets(self) -> dict[str, tuple[int, Plane]]:
        """plane -> (byte offset in the tile, plane)."""
        return {plane.name: (offset, plane) for plane, offset in zip(self.planes, self._plane_ends, strict=False)}

    def owned_part(self, fragment: Fragment) -> tuple[slice, slice]:
        """The owned elements of a fragment: their place among the tile's owned ones, and in the flattened parameter."""
        first = max(fragment.offset, self.owned.start)
        last = max(first, min(fragment.end, self.owned.stop))
        shift = fragment.start - fragment.offset
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
    identity: dict[str, Any]  # all that decides where things lie, as JSON values

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        return tuple(tile for record in self.records for tile in record.tiles)

    @cached_property
    def _classes(self) -> Counter[int]:
        """Bytes of a tile -> how many tiles have that size."""
        return Counter(tile.bytes for tile in self.tiles)

    @cached_property
    def _places(self) -> list[tuple[int, int, int, int]]:
        """For each tile: its class's first byte and first place in the store, its number in the class, and the class's
        number of places.
        """
        firsts, first_byte, first_place = {}, 0, 0
        for size, count in self._classes.items():
            firsts[size] = (first_byte, first_place)
            first_byte, first_place = first_byte + size * (count + 1), first_place + count + 1
        found, numbers = [], Counter[int]()
        for tile in self.tiles:
            found.append((*firsts[tile.bytes], numbers[tile.bytes], self._classes[tile.bytes] + 1))
            numbers[tile.bytes] += 1
        return found

    @cached_property
    def _gradient_offsets(self) -> list[int]:
        return list(accumulate((tile.gradient_bytes for tile in self.tiles), initial=self.state_bytes))

    @cached_property
    def state_bytes(self) -> int:
        return sum(size * (count + 1) for size, count in self._classes.items())

    @property
    def gradient_bytes(self) -> int:
        return self.file_bytes - self.state_bytes

    @property
    def file_bytes(self) -> int:
        return self._gradient_offsets[-1]

    @property
    def num_places(self) -> int:
        """Places for a tile's state: one more than there are tiles for each size of tiles."""
        return len(self.tiles) + len(self._classes)

    def offset(self, tile: Tile, rotation: int) -> int:
        """Byte offset of a tile's state after `rotation` updates of it."""
        first_byte, _, number, places = self._places[tile.index]
        return first_byte + (number - rotation) % places * tile.bytes

    def place(self, tile: Tile, rotation: int) -> int:
        """The number, from 0, of the place at `offset(tile, rotation)`."""
        _, first_place, number, places = self._places[tile.index]
        return first_place + (number - rotation) % places

    def gradient_offset(self, tile: Tile) -> int:
        return self._gradient_offsets[tile.index]


def ahead_tiles(tiles: Sequence[Tile], buffer_bytes: int) -> list[Tile]:
    """The first tiles, whose state is read ahead: as many as half of the buffers hold, so that the other half stays
    free.
    """
    held = accumulate(tile.bytes - tile.compute_bytes + tile.gradient_bytes for tile in tiles)
    return [tile for tile, total in zip(tiles, held, strict=True) if total <= buffer_bytes // 2]


def make_layout(
    recipe: Recipe,
    state_format: FormatName,
    *,
    split_above: int | None,
    tile_elements: int,
    shard: tuple[int, int] = (0, 1),
) -> Layout:
    """The layout for a recipe. split_above: cut tensors larger than so many elements; None: never (weights that are
    used in the store's memory must be contiguous).
    """
    form, (rank, ranks) = FORMATS[state_format], shard
    accumulated = recipe.batch.global_batch_size > recipe.batch.micro_batch_size
    granule = GRANULE * ranks
    limit = None if split_above is None else max(granule, split_above // granule * granule)
    records: list[Record] = []
    index = 0
    for number, (name, group) in enumerate(groupby(parameter_specs(recipe.model), _record_name)):
        specs, tiles, offset = tuple(group), list[Tile](), 0
        for compute, fragments in _cut(specs, recipe.precision.compute, tile_elements, limit):
            elements = _round_up(fragments[-1].end, granule)
            owned = range(elements // ranks * rank, elements // ranks * (rank + 1))
            gradient, planes = "float32" if accumulated else compute, form.planes(compute)
            tiles.append(Tile(index, number, compute, tuple(fragments), elements, owned, planes, gradient, offset))
            offset += planes[0].bytes(elements)
            index += 1
        records.append(Record(number, name, specs, tuple(tiles)))
    identity = {
        "version": 2,
        "model": recipe.model.model_dump(mode="json"),
        "compute": recipe.precision.compute,
        "format": state_format,
        "accumulated": accumulated,
        "tile_elements": tile_elements,
        "split_above": limit,
        "shard": list(shard),
    }
    return Layout(tuple(records), form, shard, identity)


def _record_name(spec: ParameterSpec) -> str:
    first, *rest = spec.name.split(".")
    return f"layers.{rest[0]}" if first == "layers" else first if first == "embedding" else "head"


def _cut(
    specs: Sequence[ParameterSpec], compute: str, tile_elements: int, limit: int | None
) -> list[tuple[str, list[Fragment]]]:
    """(compute dtype, fragments) of each tile of a record: small tensors together, norms apart from what computes in
    bf16, large ones last.
    """
    found: list[tuple[str, list[Fragment]]] = []
    large = [spec for spec in specs if limit is not None and spec.size > limit]
    small = [spec for spec in specs if spec not in large]
    filled = 0
    for spec in sorted(small, key=lambda spec: _dtype(spec, compute) != "float32"):
        dtype = _dtype(spec, compute)
        if not found or found[-1][0] != dtype or filled + spec.size > tile_elements:
            found.append((dtype, []))
            filled = 0
        found[-1][1].append(Fragment(spec.name, GROUP_OF_ROLE[spec.role], 0, spec.size, filled))
        filled += _round_up(spec.size, ALIGNMENT)
    for spec in large:
        assert limit is not None
        for start in range(0, spec.size, limit):
            fragment = Fragment(spec.name, GROUP_OF_ROLE[spec.role], start, min(start + limit, spec.size), 0)
            found.append((_dtype(spec, compute), [fragment]))
    return found


def _dtype(spec: ParameterSpec, compute: str) -> str:
    return "float32" if spec.role in (Role.NORM_WEIGHT, Role.NORM_BIAS) else compute
