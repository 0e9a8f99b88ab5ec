"""Which matrices are Muon's, how far it moves them, and what a recipe may not ask of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.muon import MuonConfig, muon_flops
from weftrain.core.optim import group_learning_rates, learning_rate, parameter_groups
from weftrain.core.parameters import Role
from weftrain.core.recipe_file import load_recipe
from weftrain.kernels.reference import newton_schulz

MUON = ("optimizer.name=muon", "optimizer.muon={}")


@pytest.mark.parametrize(
    ("scale", "tall", "wide"), [("match_adamw", 0.2 * 8, 0.2 * 8), ("original", 2.0, 1.0), ("spectral", 2.0, 0.5)]
)
def test_scales(scale: str, tall: float, wide: float) -> None:
    config = MuonConfig.model_validate({"scale": scale})
    assert (config.scale_of((64, 16)), config.scale_of((16, 64))) == pytest.approx((tall, wide))


def test_hidden_matrices_are_its_and_have_one_moment(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("qwen", *MUON)
    mine = {spec.name for spec in recipe.parameters if spec.optimizer == "muon"}
    assert mine == {spec.name for spec in recipe.parameters if spec.role in (Role.MATRIX, Role.OUTPUT_MATRIX)}
    assert all(spec.planes == ("weights", "exp_avg") for spec in recipe.parameters if spec.name in mine)
    assert all(len(spec.planes) == 3 for spec in recipe.parameters if spec.name not in mine)
    groups = {group.name: group for group in parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)}
    assert set(groups["muon_matrices"].parameters) == mine
    assert {name for name, group in groups.items() if group.optimizer == "muon"} == {"muon_matrices"}


def test_flops_of_a_step_are_those_that_torch_counts(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("amber", MUON[0], "optimizer.muon={iterations: 2}", "tuning.freeze=[layers.0]")
    muon, counter = recipe.optimizer.muon, FlopCounterMode(display=False)
    assert muon is not None
    with counter:
        for spec in recipe.parameters:
            if spec.trained and spec.optimizer == "muon":
                newton_schulz(torch.ones(spec.shape), a=1.0, b=1.0, c=1.0, iterations=2, eps=1e-7)
    assert muon_flops(recipe.parameters, muon) == counter.get_total_flops()


def test_its_rate_is_its_own_also_with_mup(tiny_recipe: Callable[..., Recipe]) -> None:
    """muP divides the rate of matrices by their width because of how AdamW moves them."""
    spectral = "optimizer.muon={scale: spectral, learning_rate_multiplier: 3}"
    recipe = tiny_recipe("crystal", "optimizer.name=muon", spectral)
    groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
    rates, base = group_learning_rates(groups, recipe.schedule, 1), learning_rate(recipe.schedule, 1)
    assert rates["muon_matrices"] == 3 * base
    assert rates["embeddings"] == base


def test_parameters_by_name_with_tuning(tiny_recipe: Callable[..., Recipe]) -> None:
    named = "optimizer.muon={parameters: ['layers.*.ffn', head]}"
    frozen = "tuning.freeze=[layers.0]"
    slower = "tuning.learning_rates=[{match: '*down_proj', multiplier: 0.5}]"
    recipe = tiny_recipe("amber", "optimizer.name=muon", named, frozen, slower)
    groups = {group.name: group for group in parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)}
    ffn = "layers.1.ffn"
    found = {name: groups[name].parameters for name in groups if name.startswith("muon")}
    assert found["muon_matrices"] == (f"{ffn}.gate_proj.weight", f"{ffn}.up_proj.weight", "head.weight")
    assert found["muon_matrices.rule_0"] == (f"{ffn}.down_proj.weight",)
    assert groups["muon_matrices.rule_0"].learning_rate_multiplier == 0.5
    assert all(spec.planes == ("weights",) for spec in recipe.parameters if spec.name.startswith("layers.0."))


@pytest.mark.parametrize(
    ("family", "overrides", "why"),
    [
        ("amber", MUON[:1], "name is muon and 'muon' is missing: give its keys, or muon: {} for the usual ones"),
        ("amber", MUON[1:], "name is adamw and 'muon' is given: set name: muon, or leave it out"),
        (
            "amber",
            (MUON[0], "optimizer.muon={parameters: ['*norm']}"),
            r"layers.0.attention_norm.weight is a vector of \d+, and Muon is of matrices: leave it to AdamW",
        ),
        ("amber", (MUON[0], "optimizer.muon={parameters: [zz]}"), "parameters.0: 'zz' matches no parameter"),
        ("amber", (*MUON, "tuning.freeze=['layers.*']"), "every matrix of its is frozen: set optimizer.name=adamw"),
        ("crystal", MUON, "only the scale spectral does: set optimizer.muon.scale=spectral"),
        ("amber", (MUON[0], "optimizer.muon={iterations: 0}"), "iterations"),
        ("amber", (MUON[0], "optimizer.muon={momentum: 1}"), "momentum"),
    ],
)
def test_refused(family: str, overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        load_recipe(f"{family}_demo", overrides)
