"""Parameter groups, the schedule as a pure function, and the two placements of epsilon as written in the two
optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weftrain.core.config import Recipe, ScheduleConfig
from weftrain.core.optim import beta_power, learning_rate, parameter_groups
from weftrain.core.parameters import parameter_specs


def schedule(*segments: dict[str, object], steps: int = 1) -> ScheduleConfig:
    return ScheduleConfig.model_validate({"steps": steps, "learning_rate": list(segments)})


def test_segments_by_hand() -> None:
    plan = schedule(
        {"shape": "linear", "steps": 4, "start": 0.0, "end": 0.8},
        {"shape": "cosine", "steps": 4, "start": 0.8, "end": 0.2},
        {"shape": "constant", "steps": 3, "start": 0.2},
    )
    expected = [0, 0.2, 0.4, 0.6] + [0.2 + 0.3 * (1 + math.cos(math.pi * k / 4)) for k in range(4)] + [0.2] * 3
    assert [learning_rate(plan, step) for step in range(11)] == pytest.approx(expected)
    with pytest.raises(IndexError, match="covers 11 steps"):
        learning_rate(plan, 11)


def test_decays_by_the_square_root_and_through_both_ends() -> None:
    decay = {"steps": 100, "start": 0.8, "end": 0.2}
    first, last, inverse = (
        [learning_rate(schedule({"shape": shape, **decay}), step) for step in range(100)]
        for shape in ("one_minus_sqrt", "sqrt", "inverse_sqrt")
    )
    assert first[0] == last[0] == 0.8
    assert inverse[0] == pytest.approx(0.8)
    assert first == pytest.approx([0.2 + 0.6 * (1 - math.sqrt(k / 100)) for k in range(100)])
    assert last == pytest.approx([0.2 + 0.6 * math.sqrt(1 - k / 100) for k in range(100)])
    # lr(t) = c / sqrt(t + t0), so that 1 / lr^2 lies on a line from 1 / 0.8^2 to 1 / 0.2^2
    assert [1 / rate**2 for rate in inverse] == pytest.approx(
        [1 / 0.64 + (25 - 1 / 0.64) * k / 100 for k in range(100)]
    )
    with pytest.raises(ValueError, match="above 0"):
        schedule({"shape": "inverse_sqrt", "steps": 100, "start": 0.8, "end": 0.0})


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0, 1), st.floats(0, 1))
def test_linear_segment_stays_between_its_ends(warm_up: int, steps: int, start: float, end: float) -> None:
    plan = schedule(
        {"shape": "constant", "steps": warm_up, "start": 1.0},
        {"shape": "linear", "steps": steps, "start": start, "end": end},
    )
    rates = [learning_rate(plan, warm_up + step) for step in range(steps)]
    assert rates[0] == start
    assert all(min(start, end) - 1e-12 <= rate <= max(start, end) + 1e-12 for rate in rates)
    assert rates == sorted(rates, reverse=end < start)


@pytest.mark.parametrize("family", ["crystal", "amber"])
def test_each_parameter_is_in_one_group(family: str, tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(family)
    groups = parameter_groups(recipe.model, recipe.optimizer)
    members = [name for group in groups for name in group.parameters]
    assert sorted(members) == sorted(spec.name for spec in parameter_specs(recipe.model))
    by_name = {group.name: group for group in groups}
    assert all(name.endswith("_proj.weight") for name in by_name["decoder_matrices"].parameters)
    assert by_name["norms_and_biases"].weight_decay == (0.0 if family == "crystal" else 0.1)
    multiplier = 16 / 48 if family == "crystal" else 1.0  # tiny_recipe: base width 16, width 48
    assert by_name["decoder_matrices"].learning_rate_multiplier == pytest.approx(multiplier)
    assert by_name["embeddings"].learning_rate_multiplier == by_name["norms_and_biases"].learning_rate_multiplier == 1


def test_beta_powers_are_multiplied_up_in_fp32() -> None:
    power = torch.tensor(0.9)
    for updates in range(2000):
        assert beta_power(0.9, updates) == power.item()
        power *= 0.9
    assert beta_power(0.95, 10**9) < 1e-40  # ends, at the last denormal
    assert beta_power(0.0, 5) == 0
