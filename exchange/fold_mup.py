"""Removing muP: the same function as a plain model, for formats and programs that know no multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from weftrain.core.model_config import Initialization, ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import Role, parameter_specs


def fold(config: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function as a plain model: no embedding or logits scale, attention by 1/sqrt(d), an untied head, norms
    that multiply by their weight.

    weights: canonical name -> tensor, all of them. Changed are the embedding (x embedding_scale), the head (head or
    tied embedding x logits_scale), norm weights w that stand for 1 + w, and, where attention scales by 1/d, what k is
    computed with last (/ sqrt(head_dim)): its norm, or W_k and b_k; the others are passed on, not copied. Logits agree
    to rounding (2.4e-7 in fp32). The folded model is for use, not for training on: its learning-rate groups are gone,
    and its `initialization` only records the standard deviations of the folded embedding and matrices.
    """
    scales = resolve_scales(config)
    embedding = weights["embedding.weight"]
    head = embedding if config.tie_embeddings else weights["head.weight"]
    folded = dict(weights)
    folded["embedding.weight"] = embedding * scales.embedding_scale
    if config.norm_weight_offset:
        norms = [spec.name for spec in parameter_specs(config) if spec.role is Role.NORM_WEIGHT]
        folded |= {name: config.norm_weight_offset + weights[name].float() for name in norms}
    if config.attention_scale == "inverse_head_dim":
        last = "k_proj" if config.qk_norm == "none" else "k_norm"  # a norm of k takes any factor of W_k out again
        for name in [name for name in folded if f".attention.{last}." in name]:
            folded[name] = folded[name] / math.sqrt(config.head_dim)
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
        "norm_weight_offset": 0,
        "initialization": initialization,
    }
    return ModelConfig.model_validate(plain), folded
