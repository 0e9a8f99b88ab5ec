"""muP: scales, standard deviations and the learning-rate multiplier of a wide model, derived from a narrow proxy.

With m = hidden_size / base_hidden_size (Tensor Programs V, arXiv 2203.03466, table 8, for Adam):
  decoder matrices     learning rate / m, std base_std / sqrt(m); o and down base_std / sqrt(2 m num_layers)
  embedding and head   full learning rate, std base_std; logits x base_logits_scale / m
  attention            1/d instead of 1/sqrt(d): the config's `attention_scale`, not derived here

The later fields of a model need no rule of their own, if proxy and model share the ratios that the table takes as
given: heads per key, num_heads x head_dim / hidden_size, and intermediate_size / hidden_size.
  grouped-query       k and v are maps with a fan-in of hidden_size, as q is: learning rate / m, std base_std / sqrt(m).
                      Fan-out enters none of Adam's rules. A proxy with another number of heads per key would need
                      factors of the repetition (arXiv 2605.15290), which are not derived here
  qk_norm             weights like those of any norm: full learning rate. Normed q and k have entries of size 1 at
                      every width, which is what 1/d assumes of trained ones (definition 4.1)
`analysis/coordinate_check.py` trains such a model at several widths, and tells muP from the standard parametrization.

What a reader would get wrong: norms and *all* biases train at the full learning rate, and so does an untied head, whose
width is paid for by the logits scale. CrystalCoder-7B's released numbers (0.0625, 0.13875, 0.01825, 0.00228125) come
out of these formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from weftrain.core.model_config import ModelConfig


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
    """The scales and standard deviations: derived from muP, or those in the recipe with a multiplier of 1."""
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
