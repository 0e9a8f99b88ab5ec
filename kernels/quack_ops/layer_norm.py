"""layer_norm: QuACK has its passes, and it is not offered; the reason stands in the table."""

from __future__ import annotations

from weftrain.kernels.quack_ops import _found

IMPLEMENTATION = _found.not_offered(
    "layer_norm", "quack has no differentiable layer norm: its forward and its backward are functions apart"
)
