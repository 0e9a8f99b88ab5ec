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

Tiles of frozen parameters have no moments, no gradient and no spare place: they lie where they were filled. A router's
bias, which the loads of its experts move, lies among trained parameters: their direction is spooled as its gradient,
and its moments are zeros that nobody reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from weftrain.backends.streaming.store.state_format import FORMATS, ITEM_BYTES, FormatName, Plane, StateFormat
from weftrain.core.config import Recipe
from weftrain.core.optim import parameter_groups
from weftrain.core.parameters import FP32_ROLES, ParameterSpec, Role

PAGE_BYTES = 4096  # direct I/O requires memory, offset and length in multiples of it
GRANULE = 4096  # elements: each plane of a tile then ends on a page, whatever its dtype
ALIGNMENT = 32  # elements between tensors of a tile: 64 bytes of bf16, as torch allocates
ROUTER_BIASES = "router_biases"  # in the place of a parameter group
_PLANE_BYTES = 64  # planes of a tile begin at multiples of it


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Fragment:
    """Elements start..stop of one parameter (flattened), at element `offset` of its tile."""

    name: str
    group: str  # parameter group, or ROUTER_BIASES; of a frozen parameter none, ""
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
    trained: bool = True  # each step changes it

    @cached_property
    def compute_bytes(self) -> int:
        return self.planes[0].bytes(len(self.owned))

    @cached_property
    def bytes(self) -> int:
        return _round_up(self._plane_ends[-1], PAGE_BYTES)

    @cached_property
    def gradient_bytes(self) -> int:
        return len(self.owned) * ITEM_BYTES[self.gradient_dtype] if self.trained else 0

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

    @cached_property
    def trained_size(self) -> int:
        return sum(spec.size for spec in self.specs if spec.trained)

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
    ends_at: int | None = None  # the record after which training computes nothing; None: it comes to the head

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        return tuple(tile for record in self.records for tile in record.tiles)

    @cached_property
    def _classes(self) -> Counter[tuple[int, bool]]:
        """Bytes of a tile, and whether it is trained -> how many such tiles there are."""
        return Counter((tile.bytes, tile.trained) for tile in self.tiles)

    def _places_of(self, kind: tuple[int, bool]) -> int:
        """One more than there are tiles, if they are updated."""
        return self._classes[kind] + kind[1]

    def next_trained(self, index: int) -> int | None:
        """The first tile that is updated, from `index` on."""
        return next((tile.index for tile in self.tiles[index:] if tile.trained), None)

    @cached_property
    def first_trained(self) -> int:
        """The first record with a trained parameter: backward ends there."""
        return next(record.index for record in self.records if record.trained_size)

    @property
    def trained_through(self) -> tuple[Record, ...]:
        """The layers that training computes."""
        return self.records[1:-1][: self.ends_at]

    @cached_property
    def _places(self) -> list[tuple[int, int, int, int]]:
        """For each tile: its class's first byte and first place in the store, its number in the class, and the class's
        number of places.
        """
        firsts, first_byte, first_place = {}, 0, 0
        for kind in self._classes:
            firsts[kind] = (first_byte, first_place)
            places = self._places_of(kind)
            first_byte, first_place = first_byte + kind[0] * places, first_place + places
        found, numbers = [], Counter[tuple[int, bool]]()
        for tile in self.tiles:
            kind = tile.bytes, tile.trained
            found.append((*firsts[kind], numbers[kind], self._places_of(kind)))
            numbers[kind] += 1
        return found

    @cached_property
    def _gradient_offsets(self) -> list[int]:
        return list(accumulate((tile.gradient_bytes for tile in self.tiles), initial=self.state_bytes))

    @cached_property
    def state_bytes(self) -> int:
        return sum(kind[0] * self._places_of(kind) for kind in self._classes)

    @property
    def gradient_bytes(self) -> int:
        return self.file_bytes - self.state_bytes

    @property
    def file_bytes(self) -> int:
        return self._gradient_offsets[-1]

    @property
    def num_places(self) -> int:
        """Places for a tile's state: one more than there are tiles for each size of tiles that are updated."""
        return sum(map(self._places_of, self._classes))

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
    tiles = [tile for tile in tiles if tile.trained]
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
    groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
    group_of = {name: group.name for group in groups for name in group.parameters}
    group_of |= dict.fromkeys(_moved_biases(recipe), ROUTER_BIASES)
    for number, (name, group) in enumerate(groupby(recipe.parameters, _record_name)):
        specs, tiles, offset = tuple(group), list[Tile](), 0
        for (compute, trained), fragments in _cut(specs, group_of, recipe.precision.compute, tile_elements, limit):
            elements = _round_up(fragments[-1].end, granule)
            owned = range(elements // ranks * rank, elements // ranks * (rank + 1))
            gradient, planes = "float32" if accumulated else compute, form.planes(compute)
            planes = planes if trained else planes[: -len(form.moments)]
            of = tuple(fragments)
            tiles.append(Tile(index, number, compute, of, elements, owned, planes, gradient, offset, trained))
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
    if tuning := recipe.tuning.model_dump(mode="json"):
        identity["tuning"] = tuning
    return Layout(tuple(records), form, shard, identity, recipe.objective.ends_at)


def _record_name(spec: ParameterSpec) -> str:
    first, *rest = spec.name.split(".")
    return f"layers.{rest[0]}" if first == "layers" else first if first == "embedding" else "head"


def _moved_biases(recipe: Recipe) -> set[str]:
    """Of routers that a backward pass comes by: from the first trained record to the last that training computes."""
    records = list(dict.fromkeys(map(_record_name, recipe.parameters)))
    first = next(records.index(_record_name(spec)) for spec in recipe.parameters if spec.trained)
    last = len(records) if recipe.objective.ends_at is None else recipe.objective.ends_at
    passed = records[first : last + 1]
    return {spec.name for spec in recipe.parameters if spec.role is Role.ROUTER_BIAS and _record_name(spec) in passed}


_Kind = tuple[str, bool]  # of a tile: the dtype that it computes in, and whether steps change it


def _cut(
    specs: Sequence[ParameterSpec], group_of: Mapping[str, str], compute: str, tile_elements: int, limit: int | None
) -> list[tuple[_Kind, list[Fragment]]]:
    """Kind and fragments of each tile of a record: small tensors together, norms apart from what computes in bf16,
    frozen ones apart, large ones last.
    """
    found: list[tuple[_Kind, list[Fragment]]] = []
    large = [spec for spec in specs if limit is not None and spec.size > limit]
    small = [spec for spec in specs if spec not in large]
    filled = 0
    for spec in sorted(small, key=lambda spec: (_dtype(spec, compute) != "float32", spec.name not in group_of)):
        kind = _dtype(spec, compute), spec.name in group_of
        if not found or found[-1][0] != kind or filled + spec.size > tile_elements:
            found.append((kind, []))
            filled = 0
        found[-1][1].append(Fragment(spec.name, group_of.get(spec.name, ""), 0, spec.size, filled))
        filled += _round_up(spec.size, ALIGNMENT)
    for spec in large:
        assert limit is not None
        for start in range(0, spec.size, limit):
            fragment = Fragment(spec.name, group_of.get(spec.name, ""), start, min(start + limit, spec.size), 0)
            found.append(((_dtype(spec, compute), spec.name in group_of), [fragment]))
    return found


def _dtype(spec: ParameterSpec, compute: str) -> str:
    return "float32" if spec.role in FP32_ROLES else compute
