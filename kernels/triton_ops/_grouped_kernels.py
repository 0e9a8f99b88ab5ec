"""The Triton kernels of grouped_gemm: rows times the matrix of their group, and the gradient of those matrices.

How many rows a group has is known on the device alone, and the host does not wait for it. So `products` is launched for
as many tiles of rows as there can be at most, whole ones and one more for each group; a program finds the group of its
tile from the ends of all groups, and those past the last tile end at once. Each output tile has one program, which the
device hands out as multiprocessors become free: groups of any sizes share them. Offsets within a tile are 32-bit,
the way to a tile is 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bounds(ends, group, groups, rows):
    """(first row, end) of each of `group`. Group number `groups` has the rows that are in none; nobody looks at values
    on a GPU: what lies outside of the rows is clamped.
    """
    end = tl.load(ends + group, mask=group < groups, other=rows)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group <= groups), other=0)
    return tl.minimum(tl.maximum(start, 0), rows), tl.minimum(tl.maximum(end, 0), rows)


@triton.jit
def _rows_of_tile(ends, groups, rows, tile, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end of the group) of a tile of rows; past the last tile the group is GROUPS."""
    each = tl.arange(0, GROUPS)
    start, end = _bounds(ends, each, groups, rows)
    tiles = tl.where(each <= groups, tl.maximum(end - start + BLOCK_M - 1, 0) // BLOCK_M, 0)
    through = tl.cumsum(tiles, 0)
    group = tl.sum((through <= tile).to(tl.int32), 0)
    its = each == group
    first = tl.sum(tl.where(its, start - (through - tiles) * BLOCK_M, 0), 0) + tile * BLOCK_M
    return group, first, tl.sum(tl.where(its, end, 0), 0)


@triton.jit(do_not_specialize=["rows", "groups"])
def products(
    x, weight, ends, out, rows, groups, depth, columns,
    TRANSPOSED: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of out [rows, columns] = x [rows, depth] times weight [groups, depth, columns], or where TRANSPOSED
    [groups, columns, depth]. GROUPS: a power of 2 above `groups`. A row of no group becomes 0.
    """
    across = (columns - 1) // BLOCK_N + 1
    group, first, end = _rows_of_tile(ends, groups, rows, tl.program_id(0) // across, GROUPS, BLOCK_M)
    if group > groups:
        return
    column = tl.program_id(0) % across * BLOCK_N
    row, lane, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_here, lane_here = row < end - first, lane < columns - column
    left = x + first.to(tl.int64) * depth + row[:, None] * depth + k[None, :]
    right = weight + tl.minimum(group, groups - 1).to(tl.int64) * depth * columns
    if TRANSPOSED:
        right += column.to(tl.int64) * depth + lane[None, :] * depth + k[:, None]
    else:
        right += column + k[:, None] * columns + lane[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    summed = tl.where(group == groups, 0, depth)
    for done in range(0, summed, BLOCK_K):
        here = k < depth - done
        left_tile = tl.load(left, mask=row_here[:, None] & here[None, :], other=0.0)
        right_tile = tl.load(right, mask=here[:, None] & lane_here[None, :], other=0.0)
        total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K if TRANSPOSED else BLOCK_K * columns
    to = out + first.to(tl.int64) * columns + column + row[:, None] * columns + lane[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=row_here[:, None] & lane_here[None, :])


@triton.jit(do_not_specialize=["rows", "groups"])
def outer_products(
    dy, x, ends, out, rows, groups, height, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one group's out [groups, height, columns] = dy^T x over its rows, of dy [rows, height] and x [rows,
    columns]; 0 of a group without rows.
    """
    down, across = (height - 1) // BLOCK_M + 1, (columns - 1) // BLOCK_N + 1
    tile = tl.program_id(0) % (down * across)
    group = tl.program_id(0) // (down * across)
    first, end = _bounds(ends, group, groups, rows)
    line, column = tile // across * BLOCK_M, tile % across * BLOCK_N
    row, lane, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_here, lane_here = row < height - line, lane < columns - column
    left = dy + first.to(tl.int64) * height + line + k[:, None] * height + row[None, :]
    right = x + first.to(tl.int64) * columns + column + k[:, None] * columns + lane[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for done in range(0, end - first, BLOCK_K):
        here = k < end - first - done
        left_tile = tl.load(left, mask=here[:, None] & row_here[None, :], other=0.0)
        right_tile = tl.load(right, mask=here[:, None] & lane_here[None, :], other=0.0)
        total = tl.dot(tl.trans(left_tile), right_tile, total, input_precision=PRECISION)
        left += BLOCK_K * height
        right += BLOCK_K * columns
    to = out + (group.to(tl.int64) * height + line) * columns + column + row[:, None] * columns + lane[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=row_here[:, None] & lane_here[None, :])
