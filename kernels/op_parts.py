"""What an op's file is written with, for packages that add ops of their own: example tensors, costs, calls that are
refused, and checks of arguments. kernels/README.md shows an op of another package.
"""

from __future__ import annotations

from weftrain.kernels.arguments import _alike as alike
from weftrain.kernels.arguments import _floating as floating
from weftrain.kernels.ops._changes import no_rows, on_meta, other_dtype, replaced, shorter
from weftrain.kernels.ops._parts import Draw, elements, read_all_write_like, size_bytes

__all__ = [
    "Draw",
    "alike",
    "elements",
    "floating",
    "no_rows",
    "on_meta",
    "other_dtype",
    "read_all_write_like",
    "replaced",
    "shorter",
    "size_bytes",
]
