"""newton_schulz: three launches an iteration for a whole stack of matrices. Its two symmetric products are computed on
and above the diagonal alone, which is about half of their work.

Its bits are not torch.optim.Muon's and no GPU has timed it, so it is a named choice (kernels/registry.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_newton_schulz
from weftrain.kernels.contract import Compilation
from weftrain.kernels.derivatives import outside_autocast
from weftrain.kernels.symmetric_products import STEPS, as_given, of_norm_one, unwritten_steps
from weftrain.kernels.triton_ops import _symmetric_kernels as kernels
from weftrain.kernels.triton_ops._launch import compilation, implementation, operator
from weftrain.kernels.triton_ops._tiles import Tiles, choices, constants, tiles_of

# Of the products that add, where sums are in tensor memory; sm_90 holds two, as the record of its figures says.
_ONE_BLOCK = "two would need tiles half as wide on sm_100, which read half as much again through the L2 cache"


def _launch(y: Tensor, a: float, b: float, c: float, iterations: int) -> Tensor:
    if not y.numel():
        return torch.empty_like(y)
    stack, rows, columns = y.shape
    found = tiles_of((rows, columns), y)
    how = constants(found) | {"num_warps": found.num_warps, "num_stages": found.num_stages}
    side, wide = -(-rows // found.rows), -(-columns // found.columns)
    triangle = (stack * side * (side + 1) // 2 * (found.rows // found.columns),)
    gram, polynomial = (y.new_empty(stack, rows, rows) for _ in range(2))
    buffers = [torch.empty_like(y) for _ in range(min(2, iterations))]
    for iteration in range(iterations):
        x, y = y, buffers[iteration % 2]
        kernels.symmetric[triangle](x, gram, rows, columns, 1.0, 0.0, OWN=False, **how)
        kernels.symmetric[triangle](gram, polynomial, rows, rows, c, b, OWN=True, **how)
        kernels.step[(stack * side * wide,)](polynomial, x, y, rows, columns, a, **how)
    return y


_STEPS = operator(f"newton_schulz_steps{STEPS}", _launch, unwritten_steps)


@outside_autocast
@torch.no_grad()
def newton_schulz(x: Tensor, *, a: float, b: float, c: float, iterations: int, eps: float) -> Tensor:
    """As kernels/reference.py: each product is summed in fp32, in one order, and rounded once. Gives no gradients."""
    check_newton_schulz(x, iterations, eps)
    return as_given(_STEPS(of_norm_one(x, eps), a, b, c, iterations), x)


def _compilations() -> list[Compilation]:
    return [made for choice in choices() for made in _of_tiles(*choice)]


def _of_tiles(dtype: str, found: Tiles, size: str, targets: tuple[str, ...]) -> list[Compilation]:
    types = dict.fromkeys(("x", "square", "out"), f"*{dtype}:16") | dict.fromkeys(("rows", "depth", "columns"), size)
    types |= dict.fromkeys(("scale", "own_scale"), "fp32")
    where = f"{dtype} {found}" + " unaligned" * (size == "i32")
    kinds = {
        "gram": (kernels.symmetric, {"OWN": False}),
        "polynomial": (kernels.symmetric, {"OWN": True}),
        "step": (kernels.step, {}),
    }
    return [
        compilation(
            f"{name} {where}", kernel, types, constants(found) | form, found.num_warps, found.num_stages,
            targets=targets, matrix_instructions=dtype != "fp32",
            one_block=_ONE_BLOCK if "sm_100" in targets and name != "gram" else None,
        )
        for name, (kernel, form) in kinds.items()
    ]  # fmt: skip


IMPLEMENTATION = implementation("newton_schulz", newton_schulz, _compilations)
