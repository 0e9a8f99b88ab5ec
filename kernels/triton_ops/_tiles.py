"""Tiles of matrix products whose operands are loaded by pointers: which a launch takes, by target, dtype and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weftrain.kernels.contract import KIN, TARGETS
from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, interpreting, target


class Tiles(NamedTuple):
    """What a launch is compiled with besides the shapes: rows, columns and depth of a tile, warps, pipeline stages."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}w{self.num_warps}s{self.num_stages}"


# Bytes of an element -> target -> tiles. Of bf16 and fp16, 128 x 128 sums are 64 registers of eight warps, and two
# blocks fit a multiprocessor; not of sm_80 and its kin, whose operands are in registers too. fp32 products are
# multiply-adds of single elements: small tiles, or they spill. Columns divide rows.
_TILES = {
    2: {
        "sm_80": Tiles(128, 64, 32, 8, 3),
        "sm_90": Tiles(128, 128, 64, 8, 3),
        "sm_100": Tiles(128, 128, 64, 8, 3),
        "gfx942": Tiles(128, 128, 32, 8, 2),
    },
    4: dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), Tiles(32, 32, 32, 8, 1)),
}
# Of bf16 and fp16 where rows do not begin at multiples of 16 elements: loads of single elements pass through registers,
# and spill in larger tiles.
_UNALIGNED = Tiles(64, 64, 32, 4, 2)
_INTERPRETED = Tiles(16, 16, 16, 4, 1)  # the smallest product, so that small tests have several tiles
_PRECISION = "ieee"  # of fp32 products; bf16 and fp16 know no other


def tiles_of(sizes: Sequence[int], *tensors: Tensor) -> Tiles:
    """Of a launch that reads and writes them; sizes: in elements, of which rows and matrices are multiples."""
    if interpreting():
        return _INTERPRETED
    dtype, on = tensors[0].dtype, target(tensors[0].device)
    aligned = all(size % 16 == 0 for size in (*sizes, *(one.data_ptr() for one in tensors)))
    return by_target(dtype)[on] if aligned or dtype.itemsize == 4 else _UNALIGNED


def by_target(dtype: torch.dtype) -> dict[str, Tiles]:
    """The tiles of every target; one that is not named takes those of its kin."""
    named = _TILES[dtype.itemsize]
    return {on: named[on if on in named else KIN[on]] for on in TARGETS}


def choices() -> Iterator[tuple[str, Tiles, str, tuple[str, ...]]]:
    """All that a launch may take: dtype, tiles, the type of a size (a multiple of 16, and in bf16 any) and targets."""
    for dtype, short in TRITON_DTYPES.items():
        tiles = by_target(dtype)
        for found in dict.fromkeys(tiles.values()):
            yield short, found, "i32:16", tuple(on for on in TARGETS if tiles[on] == found)
    yield "bf16", _UNALIGNED, "i32", TARGETS


def constants(found: Tiles) -> dict[str, Any]:
    """The constants by which a kernel is compiled for them."""
    return {"BLOCK_M": found.rows, "BLOCK_N": found.columns, "BLOCK_K": found.depth, "PRECISION": _PRECISION}
