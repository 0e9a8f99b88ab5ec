"""cross_entropy: Liger has one, and it is not offered; the reason stands in the table."""

from __future__ import annotations

from weftrain.kernels.liger_ops import _found

IMPLEMENTATION = _found.not_offered(
    "cross_entropy",
    "liger's cross-entropy overwrites the caller's logits with their gradient, gives token losses rounded to the "
    "logits' dtype, has no "
    "logits_scale and waits for the device to count labels",
)
