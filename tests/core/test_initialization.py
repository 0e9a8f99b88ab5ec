"""Initial weights: each tensor alone, the stated distribution, and the same numbers for good."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from model_cases import amber, crystal, decoder, large_weights

from weftrain.core.initialization import draw, initialize
from weftrain.core.model_config import Initialization, ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import Role, parameter_specs


@pytest.mark.parametrize("build", [amber, crystal])
def test_initialize_draws_each_tensor_alone(build: Callable[..., ModelConfig]) -> None:
    config = build()
    whole, by_segment = decoder(config, large_weights(config)), decoder(config, large_weights(config))
    initialize(whole, config, seed=7)
    for segment in reversed(by_segment.segments()):
        initialize(segment, config, seed=7)
    for (name, one), other in zip(whole.named_parameters(), by_segment.parameters(), strict=True):
        assert torch.equal(one, other), name
    specs = {spec.name: spec for spec in parameter_specs(config)}
    name = "layers.1.ffn.down_proj.weight"
    assert torch.equal(whole.get_parameter(name), draw(specs[name], config, 7))
    assert not torch.equal(draw(specs[name], config, 7), draw(specs[name], config, 8))
    assert not torch.equal(
        draw(specs["layers.1.attention.q_proj.weight"], config, 7),
        draw(specs["layers.1.attention.k_proj.weight"], config, 7),
    )


@pytest.mark.parametrize("distribution", ["normal", "truncated_normal"])
def test_drawn_tensors_have_the_stated_distribution(distribution: str) -> None:
    stds = Initialization.model_validate(
        {"distribution": distribution, "embedding_std": 0.1, "matrix_std": 0.2, "output_matrix_std": 0.05}
    )
    config = amber(vocab_size=4096, hidden_size=128, intermediate_size=4096, initialization=stds, linear_bias=True)
    expected = {Role.EMBEDDING: 0.1, Role.HEAD: 0.2, Role.MATRIX: 0.2, Role.OUTPUT_MATRIX: 0.05}
    # Standard deviation of a unit normal cut at 2: sqrt(1 - 4 pdf(2) / P(|z| < 2)) = 0.8796
    shrink = (
        1.0
        if distribution == "normal"
        else math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    )
    for spec in parameter_specs(config):
        values = draw(spec, config, 0)
        assert values.shape == spec.shape
        assert values.dtype is torch.float32
        if spec.role is Role.NORM_WEIGHT:
            assert (values == 1).all()
        elif spec.role in (Role.NORM_BIAS, Role.BIAS):
            assert (values == 0).all()
        elif spec.size > 500_000:
            std = expected[spec.role]
            assert values.std().item() == pytest.approx(std * shrink, rel=0.01)
            assert abs(values.mean().item()) < 0.005 * std
            largest = values.abs().max().item() / std
            assert largest <= 2.0001 if distribution == "truncated_normal" else 4 < largest < 5.5


def test_a_large_tensor_is_the_same_whatever_threads_draw_it() -> None:
    """Shares of a tensor begin where the counter stands after the elements before them."""
    config = amber(vocab_size=48_611, hidden_size=64)  # three shares, the last of them odd
    spec = parameter_specs(config)[0]
    assert spec.role is Role.EMBEDDING
    key = int.from_bytes(hashlib.sha256(f"5/{spec.name}".encode()).digest()[:16], "little")
    uniform = np.random.Generator(np.random.Philox(key=key)).random(spec.shape, dtype=np.float32)
    std = resolve_scales(config).embedding_std
    wanted = torch.from_numpy(uniform).mul_(2).add_(2**-24 - 1).erfinv_().mul_(std * math.sqrt(2))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(draw(spec, config, 5), wanted)
    finally:
        torch.set_num_threads(threads)


def test_initial_weights_never_change() -> None:
    """A seed names its weights for good: records of past runs lean on it."""
    spec = next(spec for spec in parameter_specs(crystal()) if spec.name == "layers.0.attention.q_proj.weight")
    expected = torch.tensor([-0.0322958492, -0.0295749623, -0.0311444364, -0.0640561506])
    torch.testing.assert_close(draw(spec, crystal(), 1)[0, :4], expected, rtol=1e-6, atol=0)
