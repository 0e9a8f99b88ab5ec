"""muP: CrystalCoder-7B's released numbers follow from the proxy, and folding changes nothing but the
parametrisation.
"""

from __future__ import annotations

import pytest
from model_cases import amber, crystal

from weftrain.core.initialization import draw
from weftrain.core.mup import resolve_scales
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
