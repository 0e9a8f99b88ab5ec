"""add_rms_norm: QuACK has one, and it is not offered; the reason stands in the table."""

from __future__ import annotations

from weftrain.kernels.quack_ops import _found

IMPLEMENTATION = _found.not_offered(
    "add_rms_norm",
    "quack norms the sum before it is rounded to the residual's dtype, and the contract the rounded sum, which the "
    "backward reads",
)
