"""Checkpoint files of the Model Zoo for the tests of this folder: small models, random bits, and what is equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import amber, crystal
from torch import Tensor

from weftrain.core.config import OptimizerConfig
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import parameter_specs

ADAMW = OptimizerConfig(
    name="adamw",
    beta1=0.9,
    beta2=0.95,
    eps=1e-9,
    eps_placement="before_bias_correction",
    weight_decay=0.1,
    decay="matrices_and_embeddings",
    clip_norm=1.0,
)
EMBEDDING, HEAD = "model.embedding_layer.word_embeddings.weight", "model.lm_head.weight"
NORM, NORM_AGAIN = "model.ln_f.weight", "model.transformer_decoder.norm.weight"
FAMILIES = pytest.mark.parametrize("family", [amber, crystal])
Build = Callable[..., ModelConfig]


def small(family: Build = crystal, **changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 9}
    return family(**{**sizes, **changes})


def random_state(
    config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0, planes: tuple[str, ...] = ("weights",)
) -> dict[str, Tensor]:
    """Random *bits*, thus NaNs with every payload, infinities and denormals too."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for plane in planes:
        for spec in parameter_specs(config):
            count = int(np.prod(spec.shape)) * dtype.itemsize
            raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
            state[f"{plane}/{spec.name}"] = raw.view(dtype).reshape(spec.shape)
    return state


def same(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    )


def assert_same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name in other:
        assert same(one[name], other[name]), name
