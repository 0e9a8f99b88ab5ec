"""muP: CrystalCoder-7B's released numbers follow from the proxy, and folding changes nothing but the
parametrisation.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_cases import amber, crystal, decoder, large_weights, tokens

from weftrain.core.config import ModelConfig
from weftrain.core.model import draw
from weftrain.core.mup import fold, resolve_scales
from weftrain.core.parameters import Role, parameter_specs
from weftrain.core.recipe_file import load_recipe


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_crystalcoder_7b_numbers_come_out(phase: int) -> None:
    """Released params files: embeddings_scale, output_logits_scale, adjust_learning_rate.decoder_kernel and the three
    initialisers.
    """
    derived = resolve_scales(load_recipe(f"crystalcoder_7b_phase{phase}").recipe.model)
    assert derived.embedding_scale == 14.6
    assert derived.logits_scale == 0.13875
    assert derived.matrix_learning_rate_multiplier == 0.0625
    assert derived.distribution == "truncated_normal"
    assert derived.embedding_std == 0.073
    assert derived.matrix_std == 0.01825
    assert derived.output_matrix_std == 0.00228125


def test_the_proxy_itself_is_unscaled_but_for_depth() -> None:
    derived = resolve_scales(crystal(base_hidden_size=64))
    assert (derived.logits_scale, derived.matrix_learning_rate_multiplier, derived.matrix_std) == (2.22, 1.0, 0.073)
    assert derived.output_matrix_std == pytest.approx(0.073 / 6**0.5)  # 2 x 3 layers


def test_an_untied_head_starts_and_learns_like_the_embedding() -> None:
    config = crystal(tie_embeddings=False)
    assert resolve_scales(config).head_std == resolve_scales(config).embedding_std == 0.073
    head = next(spec for spec in parameter_specs(config) if spec.role is Role.HEAD)
    assert draw(head, config, 0).std().item() == pytest.approx(0.073 * 0.8796, rel=0.05)


def test_without_mup_the_written_values_hold() -> None:
    derived = resolve_scales(amber(embedding_scale=2.0))
    assert (derived.embedding_scale, derived.logits_scale, derived.matrix_learning_rate_multiplier) == (2.0, 1.0, 1.0)
    assert (derived.embedding_std, derived.matrix_std, derived.head_std) == (0.02, 0.02, 0.02)


@pytest.mark.parametrize(
    "build",
    [
        crystal,
        lambda: crystal(tie_embeddings=False),
        lambda: amber(embedding_scale=3.0, logits_scale=0.2, tie_embeddings=True),
    ],
)
def test_folding_keeps_the_logits(build: Callable[[], ModelConfig]) -> None:
    config = build()
    weights, ids = large_weights(config), tokens(config, 2, 33)
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    plain, folded = fold(config, weights)
    scales = resolve_scales(plain)
    assert (scales.embedding_scale, scales.logits_scale, scales.matrix_learning_rate_multiplier) == (1.0, 1.0, 1.0)
    assert plain.attention_scale == "inverse_sqrt_head_dim"
    assert list(folded) == [spec.name for spec in parameter_specs(plain)]
    with torch.no_grad():
        before, after = decoder(config, weights).logits(ids), decoder(plain, folded).logits(ids)
    assert (after - before).norm() / before.norm() < 1e-5  # large weights; at initialisation scale see below
    assert all(torch.equal(weights[name], kept[name]) for name in kept)


def test_folding_error_at_initialisation_scale() -> None:
    config = crystal()
    weights = {spec.name: draw(spec, config, 0) for spec in parameter_specs(config)}
    ids = tokens(config, 2, 33)
    plain, folded = fold(config, weights)
    with torch.no_grad():
        before, after = decoder(config, weights).logits(ids), decoder(plain, folded).logits(ids)
    assert (after - before).abs().max() < 2e-6  # 2.4e-7 of logits around 1
