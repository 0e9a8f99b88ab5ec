"""cross_entropy: QuACK has one, and it is not offered; the reason stands in the table."""

from __future__ import annotations

from weftrain.kernels.quack_ops import _found

IMPLEMENTATION = _found.not_offered(
    "cross_entropy",
    "quack's backward subtracts one fp32 logsumexp, which loses the digits of large logits, reads the logit at a label "
    "outside of the row, and knows no z_loss, logits_scale or softcap",
)
