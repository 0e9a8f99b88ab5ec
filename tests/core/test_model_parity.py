"""The decoder against independent models: forward bit for bit in fp32, every mistake visible, every gradient against
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from amber_reference import amber_logits
from crystalcoder_reference import crystalcoder_logits
from model_cases import amber, crystal, decoder, large_weights, tokens
from torch import Tensor

from weftrain.core.model_config import ModelConfig
from weftrain.exchange.huggingface.config import config_to_huggingface
from weftrain.exchange.layouts import export_weights

Weights = dict[str, Tensor]
SHAPES = [(2, 33), (1, 1), (3, 64), (1, 7)]


def llama_logits(config: ModelConfig, weights: Weights, ids: Tensor) -> Tensor:
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(**config_to_huggingface(config), attn_implementation="eager")
    model = transformers.LlamaForCausalLM(settings)
    model.load_state_dict(dict(export_weights(weights, config, "llama")))
    with torch.no_grad():
        return model(ids).logits


def released_crystalcoder_logits(config: ModelConfig, weights: Weights, ids: Tensor) -> Tensor:
    return crystalcoder_logits(
        dict(export_weights(weights, config, "crystalcoder")), ids, config_to_huggingface(config)
    )


REFERENCES = {"rms_norm": llama_logits, "layer_norm": released_crystalcoder_logits}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "config",
    [
        amber(),
        amber(hidden_size=96, num_heads=3, rotary_dim=32, num_layers=2, rope_theta=500.0, norm_eps=1e-3),
        crystal(),
        crystal(hidden_size=128, num_heads=2, rotary_dim=16, num_layers=2, intermediate_size=341, norm_eps=1e-3),
    ],
    ids=["amber", "amber_wide", "crystalcoder", "crystalcoder_wide"],
)
@pytest.mark.parametrize("embedding_std", [0.35, 2e-3])
def test_forward_equals_the_released_model_bit_for_bit(
    config: ModelConfig, shape: tuple[int, int], embedding_std: float
) -> None:
    weights, ids = large_weights(config, embedding_std), tokens(config, *shape)
    with torch.no_grad():
        logits = decoder(config, weights).logits(ids)
    assert torch.equal(logits, REFERENCES[config.norm](config, weights, ids))


def swapped_gate_and_up(weights: Weights) -> Weights:
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    parts = ((name.split("."), tensor) for name, tensor in weights.items())
    return {".".join(swap.get(part, part) for part in name): tensor for name, tensor in parts}


MISTAKES: dict[str, tuple[Callable[..., ModelConfig], dict[str, Any]]] = {
    "amber: interleaved rotary": (amber, {"rotary_interleaved": True}),
    "amber: half of the rotary dimensions": (amber, {"rotary_dim": 8}),
    "amber: attention by 1/d": (amber, {"attention_scale": "inverse_head_dim"}),
    "amber: theta": (amber, {"rope_theta": 500000.0}),
    "amber: eps": (amber, {"norm_eps": 1e-5}),
    "amber: embedding scale": (amber, {"embedding_scale": 14.6}),
    "amber: logits scale": (amber, {"logits_scale": 0.555}),
    "crystalcoder: rotate-half rotary": (crystal, {"rotary_interleaved": False}),
    "crystalcoder: all rotary dimensions": (crystal, {"rotary_dim": 16}),
    "crystalcoder: attention by 1/sqrt(d)": (crystal, {"attention_scale": "inverse_sqrt_head_dim"}),
    "crystalcoder: theta": (crystal, {"rope_theta": 500000.0}),
    "crystalcoder: eps": (crystal, {"norm_eps": 1e-6}),
    "crystalcoder: no embedding scale": (crystal, {"embedding_scale": 1.0}),
    "crystalcoder: no logits scale": (crystal, {"base_logits_scale": 4.0}),  # 4 / (64 / 16) = 1
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_wrong_choice_moves_the_logits(mistake: str) -> None:
    build, change = MISTAKES[mistake]
    right = build()
    # An epsilon shows only where the mean square that it is added to is about as small: at a small embedding. The head
    # is tied to CrystalCoder's, so there the scale is made small instead.
    if mistake == "crystalcoder: eps":
        right, change = build(embedding_scale=0.01), {**change, "embedding_scale": 0.01}
    weights, ids = large_weights(right, 2e-3 if mistake == "amber: eps" else 0.35), tokens(right, 2, 33)
    with torch.no_grad():
        wrong = decoder(build(**change), weights).logits(ids)
    assert (wrong - REFERENCES[right.norm](right, weights, ids)).abs().max() > 0.05


@pytest.mark.parametrize("build", [amber, crystal])
def test_swapped_gate_and_up_moves_the_logits(build: Callable[[], ModelConfig]) -> None:
    config = build()
    weights, ids = large_weights(config), tokens(config, 2, 33)
    with torch.no_grad():
        wrong = decoder(config, swapped_gate_and_up(weights)).logits(ids)
    assert (wrong - REFERENCES[config.norm](config, weights, ids)).abs().max() > 0.05


@pytest.mark.parametrize("build", [amber, crystal])
def test_every_gradient_agrees_with_float64(build: Callable[[], ModelConfig]) -> None:
    config = build()
    weights = large_weights(config)
    ids, labels = tokens(config, 2, 33), tokens(config, 2, 33, seed=2)
    labels[0, 5:9] = -100

    model = decoder(config, weights)
    loss = model(ids, labels)
    loss.backward()

    layout, reference = ("llama", amber_logits) if config.norm == "rms_norm" else ("crystalcoder", crystalcoder_logits)
    exact = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    logits = reference(dict(export_weights(exact, config, layout)), ids, config_to_huggingface(config))
    exact_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    exact_loss.backward()

    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        expected = exact[name].grad
        assert expected is not None
        assert parameter.grad is not None
        # fp32 through three layers of large weights: measured 1.8e-5 for Amber, whose attention is the sharper, and
        # 2.3e-6
        error = (parameter.grad.double() - expected).norm() / expected.norm()
        assert error < 5e-5, (name, error)


def test_the_float64_reference_is_llama() -> None:
    config = amber()
    weights, ids = large_weights(config), tokens(config, 2, 33)
    plain = amber_logits(dict(export_weights(weights, config, "llama")), ids, config_to_huggingface(config))
    torch.testing.assert_close(plain, llama_logits(config, weights, ids), atol=1e-4, rtol=0)
