"""Rotary positions (arXiv 2104.09864): the tables of cos and sin that each layer turns its queries and keys by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weftrain.core.model_config import LinearScaling, Llama3Scaling, ModelConfig, RotaryScaling, YarnScaling

Rotary = tuple[Tensor, Tensor]  # cos and sin of positions, fp32 [T, rotary_dim / 2], or [B, T, rotary_dim / 2]


def rotary_kind(config: ModelConfig, layer: int) -> str:
    """The table that a layer turns by: "unscaled" also where the recipe scales none, or "none"."""
    kind = config.kind_of(layer).rotary
    return "unscaled" if kind == "scaled" and config.rotary_scaling is None else kind


def rotary_kinds(config: ModelConfig) -> list[str]:
    """The tables that some layer turns by, each once."""
    return sorted({rotary_kind(config, layer) for layer in range(len(config.layer_pattern))} - {"none"})


def rotary_tables(config: ModelConfig) -> dict[str, Rotary]:
    """Kind -> cos and sin, fp32 [max_position_embeddings, rotary_dim / 2], of position x frequency.

    Computed on the CPU, so they are the same everywhere; the meta device's `arange` would import torch's compiler.
    """
    position = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")
    tables = {}
    for kind in rotary_kinds(config):
        frequency, factor = rotary_frequencies(config, config.rotary_scaling if kind == "scaled" else None)
        angle = torch.outer(position, frequency)
        cos, sin = angle.cos(), angle.sin()
        tables[kind] = (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)
    return tables


def rotary_frequencies(config: ModelConfig, scaling: RotaryScaling | None) -> tuple[Tensor, float]:
    """fp32 [rotary_dim / 2], theta^(-2i / rotary_dim) with the scaling applied, and a factor of cos and sin.

    The order of operations is that of Hugging Face's modeling_rope_utils, for the same bits. The reciprocal is taken
    last, as the Cerebras Model Zoo does too: theta^(-x) differs in the last bit.
    """
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
    power = config.rope_theta**exponent
    frequency = 1.0 / power
    if scaling is None:
        return frequency, 1.0
    if isinstance(scaling, LinearScaling):
        return frequency / scaling.factor, 1.0
    if isinstance(scaling, Llama3Scaling):
        original, low, high = (
            scaling.original_max_position_embeddings,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
        )
        wavelength = 2 * math.pi / frequency
        stretched = torch.where(wavelength > original / low, frequency / scaling.factor, frequency)
        share = (original / wavelength - low) / (high - low)
        blended = (1 - share) * stretched / scaling.factor + share * stretched
        between = (wavelength >= original / high) & (wavelength <= original / low)
        return torch.where(between, blended, stretched), 1.0
    first, last = (_turning_dimension(config, scaling, turns) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.rotary_dim - 1)
    last += 0.001 if first == last else 0
    pair = torch.arange(config.rotary_dim // 2, dtype=torch.float32, device="cpu")
    ramp = torch.clamp((pair - first) / (last - first), 0, 1)
    kept = 1 - ramp
    factor = scaling.attention_factor or (1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0)
    return 1.0 / (scaling.factor * power) * (1 - kept) + frequency * kept, factor


def _turning_dimension(config: ModelConfig, scaling: YarnScaling, turns: float) -> float:
    """The pair, as a real number, whose angle passes through `turns` full circles within the original length."""
    length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return config.rotary_dim * math.log(length) / (2 * math.log(config.rope_theta))
