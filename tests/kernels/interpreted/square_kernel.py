"""A kernel that writes down where the squares of a triangle are, for test_triton_ops.py; imported when it runs."""

from __future__ import annotations

import triton
import triton.language as tl

from weftrain.kernels.triton_ops._symmetric_kernels import _square


@triton.jit
def places(first, rows, columns, COUNT: tl.constexpr):
    """Of COUNT squares from number `first`."""
    each = tl.arange(0, COUNT)
    row, column = _square(first + each)
    tl.store(rows + each, row)
    tl.store(columns + each, column)
