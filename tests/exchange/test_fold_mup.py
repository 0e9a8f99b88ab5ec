"""Folding changes nothing but the parametrisation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_cases import amber, crystal, decoder, large_weights, tokens

from weftrain.core.initialization import draw
from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import parameter_specs
from weftrain.exchange.fold_mup import fold


@pytest.mark.parametrize(
    "build",
    [
        crystal,
        lambda: crystal(tie_embeddings=False),
        lambda: amber(embedding_scale=3.0, logits_scale=0.2, tie_embeddings=True),
        lambda: amber(norm_weight_offset=1, num_kv_heads=2),
        lambda: amber(attention_scale="inverse_head_dim", qkv_bias=True, num_kv_heads=1),
        lambda: amber(attention_scale="inverse_head_dim", qk_norm="per_head", norm_weight_offset=1),
        lambda: crystal(qk_norm="full", qkv_bias=False),
    ],
)
def test_folding_keeps_the_logits(build: Callable[[], ModelConfig]) -> None:
    config = build()
    weights, ids = large_weights(config), tokens(config, 2, 33)
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    plain, folded = fold(config, weights)
    scales = resolve_scales(plain)
    assert (scales.embedding_scale, scales.logits_scale, scales.matrix_learning_rate_multiplier) == (1.0, 1.0, 1.0)
    assert (plain.attention_scale, plain.norm_weight_offset) == ("inverse_sqrt_head_dim", 0)
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
