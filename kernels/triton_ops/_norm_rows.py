"""What rms_norm and layer_norm share: the sizes of their launches, which rows they take, and what is compiled ahead.

One program holds a whole row in registers. The backward runs in a fixed number of programs, each with its own partial
sums of the parameters' gradients. There are no atomics: partial sums are [programs, n] and added by one more pass, so
the bits depend neither on the order in which programs run nor on how many processors the GPU has.
"""

from __future__ import annotations

from typing import Any

from weftrain.kernels.contract import Compilation, Spec
from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, compilation, next_power_of_2

# of the backward: two waves on a large GPU; constant, so that the same rows meet in the same partial sum everywhere
PROGRAMS = 256
_MAX_HIDDEN_SIZE = 8192  # 16384 spills
_MAX_ANY_HIDDEN_SIZE = 4096  # of sizes that are no multiple of 16: their addresses take registers too


def row_launch(n: int) -> dict[str, int]:
    """The block and the warps of a program that holds a row of n elements."""
    block = next_power_of_2(n)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def needs(spec: Spec) -> str | None:
    """Why rows of that hidden_size are not taken."""
    n = int(spec.attributes["hidden_size"])
    if n <= _MAX_ANY_HIDDEN_SIZE or (n <= _MAX_HIDDEN_SIZE and n % 16 == 0):
        return None
    return f"needs hidden_size <= {_MAX_HIDDEN_SIZE}, and a multiple of 16 beyond {_MAX_ANY_HIDDEN_SIZE}; this is {n}"


def compilations(forward: Any, backward: Any) -> list[Compilation]:
    """Both kernels at 4096 (Amber, CrystalCoder), and in fp32, which takes most registers, at the largest of any size,
    where nothing is aligned, and the largest that is offered.
    """
    found = []
    shapes = [(dtype, 4096, "i32:16") for dtype in TRITON_DTYPES.values()]
    for dtype, n, size in (*shapes, ("fp32", _MAX_ANY_HIDDEN_SIZE - 1, "i32"), ("fp32", _MAX_HIDDEN_SIZE, "i32:16")):
        types = dict.fromkeys(("x", "y", "dx", "dy"), f"*{dtype}:16") | {"eps": "fp32"}
        types |= dict.fromkeys(("weight", "bias", "mean", "rstd", "dweight_partial", "dbias_partial"), "*fp32:16")
        types |= dict.fromkeys(("row_stride", "x_row_stride", "dy_row_stride", "rows", "n"), size)
        launch = row_launch(n)
        block, warps = {"BLOCK": launch["BLOCK"]}, launch["num_warps"]
        found += [
            compilation(f"forward {dtype} n{n}", forward, types, block, warps),
            compilation(f"backward {dtype} n{n}", backward, types, {"PROGRAMS": PROGRAMS, **block}, warps),
        ]
    return found
