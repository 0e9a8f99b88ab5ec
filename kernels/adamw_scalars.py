"""The seven numbers of an AdamW update that depend on no element of a tensor."""

from __future__ import annotations


def adamw_scalars(
    eps_placement: str,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    update_index: int,
) -> list[float]:
    """[1 - beta1, beta2, 1 - beta2, eps, correction, step_size, decay], in double; round each to fp32 once.

    eps after the bias correction: p = p * decay - step_size * m / (sqrt(v) / correction + eps).
    Before: p = p - step_size * (m / (sqrt(v) + eps) * correction + decay * p).
    """
    correction1 = 1 - beta1**update_index
    correction2_sqrt = (1 - beta2**update_index) ** 0.5
    if eps_placement == "after_bias_correction":
        placed = (correction2_sqrt, learning_rate / correction1, 1 - learning_rate * weight_decay)
    else:
        placed = (correction2_sqrt / correction1, learning_rate, weight_decay)
    return [float(scalar) for scalar in (1 - beta1, beta2, 1 - beta2, eps, *placed)]
