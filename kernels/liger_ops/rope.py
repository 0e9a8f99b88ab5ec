"""rope: Liger has one, and it is not offered; the reason stands in the table."""

from __future__ import annotations

from weftrain.kernels.liger_ops import _found

IMPLEMENTATION = _found.not_offered(
    "rope",
    "liger's rope turns q and k in place, in its backward the incoming gradient too, takes them as [B, H, T, D], and "
    "knows no interleaved pairs",
)
