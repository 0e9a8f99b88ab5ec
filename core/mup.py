"""muP: scales, standard deviations and the learning-rate multiplier of a wide model, derived from a narrow proxy; and
their removal.

With m = hidden_size / base_hidden_size (Tensor Programs V, arXiv 2203.03466, table 8, for Adam):
  decoder matrices     learning rate / m, std base_std / sqrt(m); the two into the residual stream base_std / sqrt(2 m
  num_layers)
  embedding and head   full learning rate, std base_std; logits x base_logits_scale / m
  attention            1/d instead of 1/sqrt(d): the config's `attention_scale`, not derived here What a reader would
                       get wrong: norms and *all* biases train at the full learning rate, and so does an untied head,
                       whose width is paid for by the logits scale. CrystalCoder-7B's released numbers (0.0625, 0.13875,
                       0.01825, 0.00228125) come out of these formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weftrain.core.config import Initialization, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Resolved:
    """What the model multiplies by and starts from, whether it was derived by muP or written in the recipe."""

    embedding_scale: float  # times the embedding's output
    logits_scale: float  # times hidden @ head^T
    matrix_learning_rate_multiplier: float  # for roles MATRIX and OUTPUT_MATRIX; all others have 1
    # truncated at two standard deviations, which are those before truncation
    distribution: Literal["normal", "truncated_normal"]
    embedding_std: float
    head_std: float  # of an untied head
    matrix_std: float
    output_matrix_std: float


def resolve_scales(config: ModelConfig) -> Resolved:
    """The scales and standard deviations of either kind of config; without muP, those written there and a multiplier of
    1.
    """
    if config.mup is None:
        assert config.initialization is not None  # ModelConfig holds exactly one of the two
        given = config.initialization
        return Resolved(
            embedding_scale=config.embedding_scale or 1.0,
            logits_scale=config.logits_scale or 1.0,
            matrix_learning_rate_multiplier=1.0,
            distribution=given.distribution,
            embedding_std=given.embedding_std,
            head_std=given.matrix_std,
            matrix_std=given.matrix_std,
            output_matrix_std=given.output_matrix_std,
        )
    mup = config.mup
    width = config.hidden_size / mup.base_hidden_size
    return Resolved(
        embedding_scale=mup.embedding_scale,
        logits_scale=mup.base_logits_scale / width,
        matrix_learning_rate_multiplier=1 / width,
        distribution=mup.distribution,
        embedding_std=mup.base_std,
        head_std=mup.base_std,
        matrix_std=mup.base_std / math.sqrt(width),
        output_matrix_std=mup.base_std / math.sqrt(2 * width * config.num_layers),
    )


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
