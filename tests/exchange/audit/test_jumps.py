"""A change that stands out of those around it, and the smooth, noisy and sparser series that have none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from weftrain.exchange.audit.jumps import jumps, outliers

STEPS = np.arange(1, 121)
SMOOTH = np.log(1 + 5 * (1 - np.exp(-STEPS / 30)))


def test_a_level_that_shifts_and_a_value_that_stands_alone() -> None:
    shifted = SMOOTH + 0.4 * (STEPS > 100)
    assert outliers(jumps(shifted.tolist(), 0.03)) == [(99, 100)]
    alone = SMOOTH.copy()
    alone[60] += 0.4
    assert outliers(jumps(alone.tolist(), 0.03)) == [(60, 60)]
    last = SMOOTH.copy()
    last[-1] += 0.4
    assert outliers(jumps(last.tolist(), 0.03)) == [(118, 119)]


@pytest.mark.parametrize("seed", range(5))
def test_no_false_alarm(seed: int) -> None:
    generator = np.random.default_rng(seed)
    noisy = SMOOTH + 0.01 * generator.standard_normal(len(STEPS))
    sparser = np.concatenate([SMOOTH[:60], SMOOTH[60::10]])
    walk = np.cumsum(0.05 * generator.standard_normal(200))
    decay = 10 * np.exp(-STEPS / 3)
    for values in (SMOOTH, noisy, sparser, walk, decay, np.zeros(50), np.full(9, math.nan)):
        assert jumps(values.tolist(), 0.03) == []
