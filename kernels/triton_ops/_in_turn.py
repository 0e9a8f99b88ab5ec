"""For Triton kernels whose programs add to one tile in a fixed order, so that the sum's bits do not depend on the run.

A counter in global memory says how many have added. A program may wait only for programs of smaller ids, which a GPU
starts before it. PTX, so for NVIDIA; interpreted programs run one after the other and need not wait.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wait(counter, value):
    """Until the counter has the value; what other programs wrote before they raised it is then visible.

    PTX, since a loop of Triton's own would keep the loop around it from being pipelined.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred waiting; .reg .b32 found; again: ld.acquire.gpu.global.b32 found, [$1]; "
        "setp.ne.s32 waiting, found, $2; @waiting bra again; mov.b32 $0, found; }",
        "=r,l,r", [counter, value], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _all_threads_have_come(value):
    """A barrier of the program's threads, in PTX for the same reason."""
    tl.inline_asm_elementwise(
        "bar.sync 0; mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def add_in_turn(
    dq_at, dq_row, turn_at, position, tile, first, T,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add a tile to dq once `position` others have done so: the same sum each time, whoever runs when.

    Interpreted programs run one after the other, in order: a turn that has not come never will, and gives NaN.
    """
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    pointers = dq_at + row[:, None] * dq_row + column[None, :]
    inside = (first + row[:, None] < T) & (column[None, :] < HEAD_DIM)
    if INTERPRETED:
        tile = tl.where(tl.load(turn_at) == position, tile, float("nan"))
    else:
        _wait(turn_at, position)
    tl.atomic_add(pointers, tile, mask=inside, sem="relaxed")
    if not INTERPRETED:
        _all_threads_have_come(position)
    tl.atomic_xchg(turn_at, position + 1, sem="release")
