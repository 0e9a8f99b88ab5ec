"""grouped_gemm for a CPU: the blocks of all groups are one list of tasks that threads share, so small groups keep them
busy. Operands are packed in tiles of 1 KiB, each once, and multiplied by AMX where the CPU has it (grouped.cpp).

fp32 was tried and left out: by fused multiply-adds of the same tiles it took 0.84 to 1.6 times as long as torch's loop.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_grouped_gemm
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
from weftrain.kernels.derivatives import outside_autocast
from weftrain.kernels.grouped_products import (
    OUTER_PRODUCTS,
    PRODUCTS,
    differentiable_products,
    empty_outer_products,
    empty_products,
)
from weftrain.kernels.operators import define_operator

_LIBRARY = torch.library.Library("weftrain", "FRAGMENT")
_ROWS_OF_A_TASK, _COLUMNS_OF_A_TASK = 1024, 128


@outside_autocast
def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, K], weight [E, M, K], bf16, ends int32 [E] -> [N, M] (kernels/reference.py). Sums in fp32, rounded
    once; the bits do not depend on the number of threads. Saves x and weight. Numbers of bf16 below 2^-126 are 0 to it.
    """
    check_grouped_gemm(x, weight, ends)
    refuse_unless("grouped_gemm", x.dtype == torch.bfloat16, "bfloat16", x)
    return _DIFFERENTIABLE(x, weight, ends)


def _products(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    found = empty_products(x, weight, ends, transposed)
    _multiply(x, weight, found, ends, outer=False, transposed=transposed)
    found[int(ends[-1]) :] = 0
    return found


def _outer_products(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    found = empty_outer_products(dy, x, ends)
    _multiply(dy, x, found, ends, outer=True, transposed=False)
    return found


def _multiply(x: Tensor, other: Tensor, out: Tensor, ends: Tensor, *, outer: bool, transposed: bool) -> None:
    sizes = (ctypes.c_int64(len(ends)), ctypes.c_int64(x.shape[1]), ctypes.c_int64(out.shape[-1]))
    needed = (ctypes.c_int64 * 2)()
    library().weftrain_grouped_bytes(ctypes.c_int(outer), pointer(ends), *sizes, needed)
    count = threads()
    packed, blocks = (torch.empty(size, dtype=torch.uint8) for size in (needed[0], needed[1] * count.value))
    library().weftrain_grouped(
        ctypes.c_int(has_tiles()), ctypes.c_int(outer), ctypes.c_int(transposed),
        pointer(x), pointer(other), pointer(out), pointer(ends), *sizes,
        pointer(packed), pointer(blocks), ctypes.c_int64(needed[1]), count,
    )  # fmt: skip


_DIFFERENTIABLE = differentiable_products(
    "cpp",
    define_operator(_LIBRARY, f"cpp_grouped_products{PRODUCTS}", {"CPU": _products}, empty_products),
    define_operator(
        _LIBRARY, f"cpp_grouped_outer_products{OUTER_PRODUCTS}", {"CPU": _outer_products}, empty_outer_products
    ),
)


def _needs(spec: Spec) -> str | None:
    return needs_bfloat16(spec) or unavailable(spec)


IMPLEMENTATION = Implementation(
    "grouped_gemm",
    "cpp",
    grouped_gemm,
    _needs,
    version(),
    files=FILES,
    thresholds={"rows": 2 * _ROWS_OF_A_TASK, "outputs": _COLUMNS_OF_A_TASK},
)
