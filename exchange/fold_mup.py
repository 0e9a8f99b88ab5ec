"""Removing muP: the same function as a plain model, for formats and programs that know no multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from weftrain.core.model_config import Initialization, ModelConfig
from weftrain.core.mup import resolve_scales


def fold(config: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function as a plain model: no embedding or logits scale, attention by 1/sqrt(d), an untied head.

    weights: canonical name -> tensor, all of them. Changed are the embedding (x embedding_scale), the head (head or
    tied embedding x logits_scale) and, where attention scales by 1/d, W_k and b_k (/ sqrt(head_dim)); the others are
    passed on, not copied. Logits agree to rounding (2.4e-7 in fp32). The folded model is for use, not for training on:
    its learning-rate groups are gone, and its `initialization` only records the standard deviations of the folded
    embedding and matrices.
    """
    scales = resolve_scales(config)
    embedding = weights["embedding.weight"]
    head = embedding if config.tie_embeddings else weights["head.weight"]
    folded = dict(weights)
    folded["embedding.weight"] = embedding * scales.embedding_scale
    if config.attention_scale == "inverse_head_dim":
        for layer in range(config.num_layers):
            for part in ("weight", "bias") if config.linear_bias else ("weight",):
                name = f"layers.{layer}.attention.k_proj.{part}"
                folded[name] = weights[name] / math.sqrt(config.head_dim)
    folded["head.weight"] = head * scales.logits_scale
    initialization = Initialization(
        distribution=scales.distribution,
        embedding_std=scales.embedding_std * scales.embedding_scale,
        matrix_std=scales.matrix_std,
        output_matrix_std=scales.output_matrix_std,
    )
    removed = {"mup": None, "embedding_scale": None, "logits_scale": None, "tie_embeddings": False}
    plain = {
        **config.model_dump(),
        **removed,
        "attention_scale": "inverse_sqrt_head_dim",
        "initialization": initialization,
    }
    return ModelConfig.model_validate(plain), folded
