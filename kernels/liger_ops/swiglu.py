"""swiglu: Liger has one, and it is not offered; the reason stands in the table."""

from __future__ import annotations

from weftrain.kernels.liger_ops import _found

IMPLEMENTATION = _found.not_offered(
    "swiglu",
    "liger's swiglu overwrites gate and up with their gradients in its backward, so whoever else reads them, or a "
    "second backward, gets "
    "gradients for activations",
)
