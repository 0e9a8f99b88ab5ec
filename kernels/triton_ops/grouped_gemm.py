"""grouped_gemm: one launch for all groups, forward and for each gradient, and the host waits for nothing.

Without a GPU that times it, torch's grouped_mm stays before it in the default order (kernels/registry.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_grouped_gemm
from weftrain.kernels.contract import KIN, TARGETS, Compilation
from weftrain.kernels.derivatives import outside_autocast
from weftrain.kernels.grouped_products import (
    OUTER_PRODUCTS,
    PRODUCTS,
    differentiable_products,
    empty_outer_products,
    empty_products,
)
from weftrain.kernels.triton_ops import _grouped_kernels as kernels
from weftrain.kernels.triton_ops._launch import (
    TRITON_DTYPES,
    compilation,
    implementation,
    interpreting,
    next_power_of_2,
    operator,
    target,
)


class Tiles(NamedTuple):
    """What a launch is compiled with besides the shapes: rows, columns and depth of a tile, warps, pipeline stages."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Bytes of an element -> target -> tiles. Of bf16 and fp16, 128 x 128 sums are 64 registers of eight warps, and two
# blocks fit a multiprocessor; not of sm_80 and its kin, whose operands are in registers too. fp32 products are
# multiply-adds of single elements: small tiles, or they spill.
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


def _tiles(sizes: Sequence[int], *tensors: Tensor) -> Tiles:
    """Of a launch that reads and writes them; sizes: in elements, of which rows and matrices are multiples."""
    if interpreting():
        return _INTERPRETED
    element_size, on = tensors[0].element_size(), target(tensors[0].device)
    aligned = all(size % 16 == 0 for size in (*sizes, *(one.data_ptr() for one in tensors)))
    return _lines(element_size)[on] if aligned or element_size == 4 else _UNALIGNED


def _lines(element_size: int) -> dict[str, Tiles]:
    """The tiles of every target; one that is not named takes those of its kin."""
    named = _TILES[element_size]
    return {on: named[on if on in named else KIN[on]] for on in TARGETS}


def _constants(found: Tiles) -> dict[str, Any]:
    return {"BLOCK_M": found.rows, "BLOCK_N": found.columns, "BLOCK_K": found.depth, "PRECISION": _PRECISION}


def _groups(count: int) -> int:
    """Places for all groups, and for the rows of none."""
    return next_power_of_2(count + 1)


def _launch_products(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    out = empty_products(x, weight, ends, transposed)
    if out.numel():
        found, groups, columns = _tiles(weight.shape[1:], x, weight), len(weight), out.shape[1]
        most = min(len(x), len(x) // found.rows + groups + 1)
        kernels.products[(most * -(-columns // found.columns),)](
            x, weight, ends, out, len(x), groups, x.shape[1], columns,
            TRANSPOSED=transposed, GROUPS=_groups(groups), **_constants(found),
            num_warps=found.num_warps, num_stages=found.num_stages,
        )  # fmt: skip
    return out


def _launch_outer_products(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    out = empty_outer_products(dy, x, ends)
    if not len(x):
        return out.zero_()
    found = _tiles(out.shape[1:], dy, x)
    groups, height, columns = out.shape
    kernels.outer_products[(groups * -(-height // found.rows) * -(-columns // found.columns),)](
        dy, x, ends, out, len(x), groups, height, columns, **_constants(found),
        num_warps=found.num_warps, num_stages=found.num_stages,
    )  # fmt: skip
    return out


_DIFFERENTIABLE = differentiable_products(
    "triton",
    operator(f"grouped_gemm_products{PRODUCTS}", _launch_products, empty_products),
    operator(f"grouped_gemm_outer_products{OUTER_PRODUCTS}", _launch_outer_products, empty_outer_products),
)


@outside_autocast
def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As kernels/reference.py; sums in fp32, in one order, rounded once. Saves x and weight. Ends that are no ends of
    groups of these rows are refused on a CPU, and elsewhere give other numbers, from within the tensors.
    """
    check_grouped_gemm(x, weight, ends)
    return _DIFFERENTIABLE(x, weight, ends)


def _compilations() -> list[Compilation]:
    """Of 64 groups, at sizes that are multiples of 16, and in bf16 at others."""
    made = []
    for dtype, short in TRITON_DTYPES.items():
        by_target = _lines(torch.empty(0, dtype=dtype).element_size())
        for found in dict.fromkeys(by_target.values()):
            targets = tuple(on for on in TARGETS if by_target[on] == found)
            made += _of_tiles(short, found, "i32:16", targets)
    return [*made, *_of_tiles("bf16", _UNALIGNED, "i32", TARGETS)]


def _of_tiles(dtype: str, found: Tiles, size: str, targets: tuple[str, ...]) -> list[Compilation]:
    types = dict.fromkeys(("x", "weight", "out", "dy"), f"*{dtype}:16") | {"ends": "*i32:16"}
    types |= dict.fromkeys(("rows", "groups"), "i32") | dict.fromkeys(("depth", "columns", "height"), size)
    where = f"{dtype} {found.rows}x{found.columns}x{found.depth}w{found.num_warps}s{found.num_stages}"
    where += " unaligned" * (size == "i32")
    more = {"targets": targets, "matrix_instructions": dtype != "fp32"}
    forms = {"forward": {"TRANSPOSED": True}, "backward of x": {"TRANSPOSED": False}}
    made = [
        compilation(
            f"{name} {where}", kernels.products, types, _constants(found) | form | {"GROUPS": _groups(64)},
            found.num_warps, found.num_stages, **more,
        )
        for name, form in forms.items()
    ]  # fmt: skip
    kernel, constants = kernels.outer_products, _constants(found)
    name = f"backward of weight {where}"
    return [*made, compilation(name, kernel, types, constants, found.num_warps, found.num_stages, **more)]


IMPLEMENTATION = implementation("grouped_gemm", grouped_gemm, _compilations)
