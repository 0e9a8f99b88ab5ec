"""The recipe's `model.experts` section: a mixture of experts in place of the feed-forward of most layers.

core/experts.py computes it, docs/mixture-of-experts.md has the formulas and their sources.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from weftrain.core.formats.strict_model import Count, NonNegative, Positive, PositiveInt, StrictModel

Experts = Annotated[int, Field(gt=1, le=1 << 16)]
Inner = Annotated[int, Field(gt=0, le=1 << 22)]

# of the step's tokens and all layers with experts: keys of lines of metrics (core/experts.py:measures_of)
ROUTER_MEASURES = (
    "router_load_max",
    "router_load_min",
    "router_entropy",
    "router_dropped",
    "router_aux_loss",
    "router_z_loss",
)


class ExpertsConfig(StrictModel):
    """Each token passes through `top_k` of `count` SwiGLU feed-forwards, chosen by a router, and no token is dropped.

    The losses are means over the positions of the global batch and over the layers with experts. They are added to
    what the gradient is of, not to the loss that is reported.
    """

    count: Experts
    top_k: PositiveInt
    intermediate_size: Inner  # of each expert
    shared: Count = 0  # experts that every token passes through besides; computed as one of shared x intermediate_size
    dense_layers: Count = 0  # the first layers, which have a feed-forward of model.intermediate_size
    scores: Literal["softmax", "sigmoid"] = "softmax"  # what a token's logits over the experts become
    renormalize: bool = False  # divide the chosen scores by their sum
    scale: Positive = 1.0  # times the chosen scores, after that
    aux_loss: NonNegative = 0.0  # times the balance of each row (arXiv 2101.03961, equation 4), which is 1 at best
    z_loss: NonNegative = 0.0  # times the square of each token's log-sum-exp of logits (arXiv 2202.08906, equation 5)
    # moves the bias that each expert has in the choice alone, after each step, towards equal loads (arXiv 2408.15664)
    bias_update: NonNegative = 0.0

    @property
    def function(self) -> ExpertsConfig:
        """With the factors of losses at 0: what decides a model's outputs."""
        return self.model_copy(update={"aux_loss": 0.0, "z_loss": 0.0})

    @model_validator(mode="after")
    def _check(self) -> ExpertsConfig:
        if self.top_k > self.count:
            raise ValueError(
                f"top_k {self.top_k} is above count {self.count}: a token is sent to at most all experts: lower top_k "
                "or raise count"
            )
        if self.top_k == 1 and self.renormalize:
            raise ValueError(
                "top_k 1 and renormalize true make every weight 1, so that the router learns nothing of the loss: set "
                "renormalize false"
            )
        return self
