"""grouped_gemm: one launch for all groups, forward and for each gradient, and the host waits for nothing.

Without a GPU that times it, torch's grouped_mm stays before it in the default order (kernels/registry.py).
"""

from __future__ import annotations

from torch import Tensor

from weftrain.kernels.arguments import check_grouped_gemm
from weftrain.kernels.contract import Compilation
from weftrain.kernels.derivatives import outside_autocast
from weftrain.kernels.grouped_products import (
    OUTER_PRODUCTS,
    PRODUCTS,
    differentiable_products,
    empty_outer_products,
    empty_products,
)
from weftrain.kernels.triton_ops import _grouped_kernels as kernels
from weftrain.kernels.triton_ops._launch import compilation, implementation, next_power_of_2, operator
from weftrain.kernels.triton_ops._tiles import Tiles, choices, constants, tiles_of


def _groups(count: int) -> int:
    """Places for all groups, and for the rows of none."""
    return next_power_of_2(count + 1)


def _launch_products(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    out = empty_products(x, weight, ends, transposed)
    if out.numel():
        found, groups, columns = tiles_of(weight.shape[1:], x, weight), len(weight), out.shape[1]
        most = min(len(x), len(x) // found.rows + groups + 1)
        kernels.products[(most * -(-columns // found.columns),)](
            x, weight, ends, out, len(x), groups, x.shape[1], columns,
            TRANSPOSED=transposed, GROUPS=_groups(groups), **constants(found),
            num_warps=found.num_warps, num_stages=found.num_stages,
        )  # fmt: skip
    return out


def _launch_outer_products(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    out = empty_outer_products(dy, x, ends)
    if not len(x):
        return out.zero_()
    found = tiles_of(out.shape[1:], dy, x)
    groups, height, columns = out.shape
    kernels.outer_products[(groups * -(-height // found.rows) * -(-columns // found.columns),)](
        dy, x, ends, out, len(x), groups, height, columns, **constants(found),
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
    return [made for choice in choices() for made in _of_tiles(*choice)]


def _of_tiles(dtype: str, found: Tiles, size: str, targets: tuple[str, ...]) -> list[Compilation]:
    types = dict.fromkeys(("x", "weight", "out", "dy"), f"*{dtype}:16") | {"ends": "*i32:16"}
    types |= dict.fromkeys(("rows", "groups"), "i32") | dict.fromkeys(("depth", "columns", "height"), size)
    where = f"{dtype} {found}" + " unaligned" * (size == "i32")
    more = {"targets": targets, "matrix_instructions": dtype != "fp32"}
    forms = {"forward": {"TRANSPOSED": True}, "backward of x": {"TRANSPOSED": False}}
    made = [
        compilation(
            f"{name} {where}", kernels.products, types, constants(found) | form | {"GROUPS": _groups(64)},
            found.num_warps, found.num_stages, **more,
        )
        for name, form in forms.items()
    ]  # fmt: skip
    kernel, name = kernels.outer_products, f"backward of weight {where}"
    return [*made, compilation(name, kernel, types, constants(found), found.num_warps, found.num_stages, **more)]


IMPLEMENTATION = implementation("grouped_gemm", grouped_gemm, _compilations)
