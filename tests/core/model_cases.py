"""Small Ambers and CrystalCoders, and weights large enough that a mistake shows.

At the scale of initialisation a wrong rotary style or attention scale moves no logit in the fourth decimal; with
matrices of standard deviation 0.35 it moves them by tenths and more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.model_config import Initialization, ModelConfig, Mup
from weftrain.core.parameters import Role, parameter_specs
from weftrain.kernels import select


def amber(**changes: Any) -> ModelConfig:
    fields = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "intermediate_size": 172,
        "max_position_embeddings": 64,
        "norm": "rms_norm",
        "norm_eps": 1e-6,
        "linear_bias": False,
        "rotary_dim": 16,
        "rotary_interleaved": False,
        "rope_theta": 10000.0,
        "attention_scale": "inverse_sqrt_head_dim",
        "tie_embeddings": False,
        "initialization": Initialization(
            distribution="normal", embedding_std=0.02, matrix_std=0.02, output_matrix_std=0.02
        ),
    }
    return ModelConfig(**{**fields, **changes})


def crystal(**changes: Any) -> ModelConfig:
    mup: dict[str, Any] = {"base_hidden_size": 16, "distribution": "truncated_normal", "base_std": 0.073}
    mup |= {"embedding_scale": 14.6, "base_logits_scale": 2.22}
    mup |= {key: changes.pop(key) for key in list(changes) if key in mup}
    fields = {
        "intermediate_size": 170,
        "norm": "layer_norm",
        "norm_eps": 1e-5,
        "linear_bias": True,
        "rotary_dim": 8,
        "rotary_interleaved": True,
        "attention_scale": "inverse_head_dim",
        "tie_embeddings": True,
        "initialization": None,
        "mup": Mup(**mup),
    }
    return amber(**{**fields, **changes})


def large_weights(config: ModelConfig, embedding_std: float = 0.35, seed: int = 0) -> dict[str, Tensor]:
    """Canonical name -> fp32 tensor: 0.35 x normal, norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for spec in parameter_specs(config):
        std = embedding_std if spec.role is Role.EMBEDDING else 0.35
        centre = 1.0 if spec.role is Role.NORM_WEIGHT else 0.0
        weights[spec.name] = centre + std * torch.randn(spec.shape, generator=generator)
    return weights


def decoder(
    config: ModelConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype | None = None,
    preferences: tuple[str, ...] = ("reference",),
) -> Decoder:
    """A CPU Decoder with these weights."""
    model = Decoder(config, select(kernel_specs(config, "cpu", dtype, residual_dtype), preferences), residual_dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.load_state_dict(weights)
    return model


def tokens(config: ModelConfig, sequences: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(seed))
