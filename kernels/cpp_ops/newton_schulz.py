"""newton_schulz for a CPU: of its symmetric products one triangle is computed and mirrored, in the tiles that
grouped_gemm has (newton.cpp). Its bits are not torch.optim.Muon's, so it is a named choice (kernels/registry.py).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_newton_schulz
from weftrain.kernels.contract import Implementation, Spec
from weftrain.kernels.cpp_ops._build import (
    FILES,
    has_tiles,
    library,
    needs_bfloat16,
    pointer,
    refuse_unless,
    threads,
    unavailable,
    version,
)
from weftrain.kernels.operators import define_operator
from weftrain.kernels.symmetric_products import STEPS, as_given, of_norm_one, unwritten_steps

# Of a stack of small matrices: enough that all threads have work, and few enough for a second-level cache.
_ELEMENTS_TOGETHER = 1 << 18
_COLUMNS_OF_A_TASK = 128
_LIBRARY = torch.library.Library("weftrain", "FRAGMENT")


@torch.no_grad()
def newton_schulz(x: Tensor, *, a: float, b: float, c: float, iterations: int, eps: float) -> Tensor:
    """x [..., m, n] bf16, as kernels/reference.py: each product is summed in fp32 and rounded once; the bits do not
    depend on the number of threads. Gives no gradients. Numbers of bf16 below 2^-126 are 0 to it.
    """
    check_newton_schulz(x, iterations, eps)
    refuse_unless("newton_schulz", x.dtype == torch.bfloat16, "bfloat16", x)
    return as_given(_STEPS(of_norm_one(x, eps), a, b, c, iterations), x)


def _steps(y: Tensor, a: float, b: float, c: float, iterations: int) -> Tensor:
    stack, rows, columns = y.shape
    out = torch.empty_like(y)
    if not y.numel():
        return out
    together = min(stack, max(1, _ELEMENTS_TOGETHER // (rows * columns)))
    gram, polynomial = (y.new_empty(together, rows, rows) for _ in range(2))
    sizes, needs = (ctypes.c_int64(rows), ctypes.c_int64(columns)), (ctypes.c_int64 * 3)()
    library().weftrain_newton_schulz_needs(*sizes, needs)
    count = min(threads().value, together * needs[2])
    packed, blocks = (torch.empty(size, dtype=torch.uint8) for size in (together * needs[0], count * needs[1]))
    for some, of_some in zip(y.split(together), out.split(together), strict=True):
        library().weftrain_newton_schulz(
            ctypes.c_int(has_tiles()), pointer(some), pointer(of_some), pointer(gram), pointer(polynomial),
            ctypes.c_int64(len(some)), *sizes, *map(ctypes.c_float, (a, b, c)), ctypes.c_int64(iterations),
            pointer(packed), pointer(blocks), ctypes.c_int64(needs[1]), ctypes.c_int(count),
        )  # fmt: skip
    return out


_STEPS = define_operator(_LIBRARY, f"cpp_newton_schulz_steps{STEPS}", {"CPU": _steps}, unwritten_steps)


def _needs(spec: Spec) -> str | None:
    return needs_bfloat16(spec) or unavailable(spec)


IMPLEMENTATION = Implementation(
    "newton_schulz", "cpp", newton_schulz, _needs, version(), files=FILES, thresholds={"side": _COLUMNS_OF_A_TASK}
)
