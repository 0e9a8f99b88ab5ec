"""AdamW's scalars, applied to one element, give the update of the reference for either placement of eps."""

from __future__ import annotations

import pytest
import torch

from weftrain.kernels import reference
from weftrain.kernels.adamw_scalars import adamw_scalars
from weftrain.kernels.arguments import EPS_PLACEMENTS

STATICS = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.2, "update_index": 3}


@pytest.mark.parametrize("placement", EPS_PLACEMENTS)
def test_the_scalars_give_the_references_update(placement: str) -> None:
    p, g, m, v = 0.5, 0.25, 0.125, 0.0625
    one_minus_beta1, beta2, one_minus_beta2, eps, correction, step_size, decay = adamw_scalars(placement, **STATICS)  # type: ignore[arg-type]
    new_m = m + one_minus_beta1 * (g - m)
    root = (v * beta2 + one_minus_beta2 * g * g) ** 0.5
    if placement == "after_bias_correction":
        expected = p * decay - step_size * new_m / (root / correction + eps)
    else:
        expected = p - step_size * (new_m / (root + eps) * correction + decay * p)
    tensors = [[torch.tensor([number])] for number in (p, g, m, v)]
    scale = torch.tensor(1.0)
    reference.adamw(*tensors, None, **STATICS, eps_placement=placement, gradient_scale=scale)  # type: ignore[arg-type]
    assert float(tensors[0][0]) == pytest.approx(expected, rel=1e-6)
