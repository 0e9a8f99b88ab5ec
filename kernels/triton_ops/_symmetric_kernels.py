"""The Triton kernels of newton_schulz: a product of which one triangle is computed and mirrored, and one with a matrix.

x x^T and a polynomial of it are symmetric: where rows and columns change places, a tile is the same one transposed. So
each program writes its own tile and, above the diagonal, its mirror image too. Offsets within a tile are 32-bit, the
way to a tile is 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _square(number):
    """(row, column) of a square on or above the diagonal, of those in the order of their columns."""
    column = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)  # but for the rounding of the root
    column += tl.where((column + 1) * (column + 2) // 2 <= number, 1, 0)
    column -= tl.where(column * (column + 1) // 2 > number, 1, 0)
    return number - column * (column + 1) // 2, column


@triton.jit
def symmetric(
    x, out, rows, depth, scale, own_scale,
    OWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of out [stack, rows, rows] = scale x x^T of x [stack, rows, depth], and its mirror image. OWN: x is
    symmetric itself, and own_scale x is added. BLOCK_N divides BLOCK_M: tiles are parts of squares.
    """
    parts: tl.constexpr = BLOCK_M // BLOCK_N
    side = (rows - 1) // BLOCK_M + 1
    tiles = side * (side + 1) // 2 * parts
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    down, across = _square(tile // parts)
    first, column = down * BLOCK_M, across * BLOCK_M + tile % parts * BLOCK_N
    row, lane, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_here, lane_here = row < rows - first, lane < rows - column
    its = x + matrix * rows * depth
    left = its + first.to(tl.int64) * depth + row[:, None] * depth + k[None, :]
    right = its + column.to(tl.int64) * depth + lane[None, :] * depth + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for done in range(0, depth, BLOCK_K):
        here = k < depth - done
        left_tile = tl.load(left, mask=row_here[:, None] & here[None, :], other=0.0)
        right_tile = tl.load(right, mask=here[:, None] & lane_here[None, :], other=0.0)
        total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K
    total *= scale
    corner = first.to(tl.int64) * rows + column
    if OWN:  # rows past the last as the last one: a mask of both sides takes the registers of a second block
        own = its + corner + tl.minimum(row, rows - first - 1)[:, None] * rows + lane[None, :]
        total += own_scale * tl.load(own, mask=lane_here[None, :]).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    to = out + matrix * rows * rows
    tl.store(to + corner + row[:, None] * rows + lane[None, :], result, mask=row_here[:, None] & lane_here[None, :])
    if down < across:
        mirror = to + column.to(tl.int64) * rows + first + lane[:, None] * rows + row[None, :]
        tl.store(mirror, tl.trans(result), mask=lane_here[:, None] & row_here[None, :])


@triton.jit
def step(
    square, x, out, rows, columns, own_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of out [stack, rows, columns] = square x + own_scale x, of square [stack, rows, rows] and x [stack,
    rows, columns]. Neighbours are those below each other: rows are the fewer, so what runs at once shares most.
    """
    high = (rows - 1) // BLOCK_M + 1
    tiles = high * ((columns - 1) // BLOCK_N + 1)
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first, column = tile % high * BLOCK_M, tile // high * BLOCK_N
    row, lane, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_here, lane_here = row < rows - first, lane < columns - column
    left = square + matrix * rows * rows + first.to(tl.int64) * rows + row[:, None] * rows + k[None, :]
    right = x + matrix * rows * columns + column + k[:, None] * columns + lane[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for done in range(0, rows, BLOCK_K):
        here = k < rows - done
        left_tile = tl.load(left, mask=row_here[:, None] & here[None, :], other=0.0)
        right_tile = tl.load(right, mask=here[:, None] & lane_here[None, :], other=0.0)
        total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K * columns
    at = matrix * rows * columns + first.to(tl.int64) * columns + column + row[:, None] * columns + lane[None, :]
    within = row_here[:, None] & lane_here[None, :]
    total += own_scale * tl.load(x + at, mask=within, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=within)
