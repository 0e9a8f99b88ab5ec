"""Names, roles and counts of parameters, and the FLOP formula, against the published numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from families import FAMILIES
from model_cases import amber, crystal

from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.parameters import Role, flops_per_token, parameter_count, parameter_specs
from weftrain.core.recipe_file import load_recipe
from weftrain.kernels import select


@pytest.mark.parametrize(
    ("recipe", "count"),
    [("amber_7b", 6_738_415_616), ("crystalcoder_7b_phase1", 6_575_278_720), ("crystalcoder_7b_phase3", 6_575_278_720)],
)
def test_parameter_counts_are_the_published_ones(recipe: str, count: int) -> None:
    assert parameter_count(load_recipe(recipe).recipe.model) == count


def test_names_and_roles_of_crystalcoder() -> None:
    specs = parameter_specs(crystal(num_layers=1))
    assert [(spec.name, spec.shape, spec.role) for spec in specs] == [
        ("embedding.weight", (97, 64), Role.EMBEDDING),
        ("layers.0.attention_norm.weight", (64,), Role.NORM_WEIGHT),
        ("layers.0.attention_norm.bias", (64,), Role.NORM_BIAS),
        ("layers.0.attention.q_proj.weight", (64, 64), Role.MATRIX),
        ("layers.0.attention.q_proj.bias", (64,), Role.BIAS),
        ("layers.0.attention.k_proj.weight", (64, 64), Role.MATRIX),
        ("layers.0.attention.k_proj.bias", (64,), Role.BIAS),
        ("layers.0.attention.v_proj.weight", (64, 64), Role.MATRIX),
        ("layers.0.attention.v_proj.bias", (64,), Role.BIAS),
        ("layers.0.attention.o_proj.weight", (64, 64), Role.OUTPUT_MATRIX),
        ("layers.0.attention.o_proj.bias", (64,), Role.BIAS),
        ("layers.0.ffn_norm.weight", (64,), Role.NORM_WEIGHT),
        ("layers.0.ffn_norm.bias", (64,), Role.NORM_BIAS),
        ("layers.0.ffn.gate_proj.weight", (170, 64), Role.MATRIX),
        ("layers.0.ffn.gate_proj.bias", (170,), Role.BIAS),
        ("layers.0.ffn.up_proj.weight", (170, 64), Role.MATRIX),
        ("layers.0.ffn.up_proj.bias", (170,), Role.BIAS),
        ("layers.0.ffn.down_proj.weight", (64, 170), Role.OUTPUT_MATRIX),
        ("layers.0.ffn.down_proj.bias", (64,), Role.BIAS),
        ("final_norm.weight", (64,), Role.NORM_WEIGHT),
        ("final_norm.bias", (64,), Role.NORM_BIAS),
    ]


def test_amber_has_no_biases_and_a_head_of_its_own() -> None:
    roles = {spec.role for spec in parameter_specs(amber())}
    assert roles == {Role.EMBEDDING, Role.NORM_WEIGHT, Role.MATRIX, Role.OUTPUT_MATRIX, Role.HEAD}
    assert parameter_specs(amber())[-1].name == "head.weight"


def test_flops_of_amber_7b() -> None:
    """6 x (32 x (4 x 4096^2 + 3 x 4096 x 11008) + 32000 x 4096) + 12 x 32 x 4096 x 2048, written out."""
    config = load_recipe("amber_7b").recipe.model
    assert flops_per_token(config, 2048) == 6 * (6_476_005_376 + 131_072_000) + 3_221_225_472
    assert flops_per_token(config, 1024) == flops_per_token(config, 2048) - 3_221_225_472 // 2


def test_a_tied_head_is_a_matrix_product_too() -> None:
    assert flops_per_token(amber(tie_embeddings=True), 64) == flops_per_token(amber(), 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_of_every_family_are_those_of_the_decoder(name: str) -> None:
    config = FAMILIES[name].ours
    with torch.device("meta"):
        model = Decoder(config, select(kernel_specs(config, "cpu", torch.float32), ("reference",)))
    found = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert found == [(spec.name, spec.shape) for spec in parameter_specs(config)]


def test_flops_of_windows_and_shared_heads() -> None:
    full = amber(num_layers=4)
    attention = 12 * 64 * 4 * 64
    assert flops_per_token(full, 64) - flops_per_token(full, 0) == attention
    half = amber(num_layers=4, layer_pattern=[{"window": 16}, {}])
    assert flops_per_token(half, 64) - flops_per_token(half, 0) == attention / 2 * (1 + 16 / 64)
    assert flops_per_token(half, 8) == flops_per_token(full, 8)  # a window longer than the row saves nothing
    grouped = amber(num_layers=4, num_kv_heads=1)  # fewer parameters in products, the same products of q and k
    assert flops_per_token(full, 64) - flops_per_token(grouped, 64) == 6 * 4 * 2 * 64 * 48
    wide = amber(num_layers=4, head_dim=32)
    assert flops_per_token(wide, 64) - flops_per_token(wide, 0) == 2 * attention


def test_parameters_and_mup_need_no_torch() -> None:
    program = "import sys, weftrain.core.mup, weftrain.core.parameters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
