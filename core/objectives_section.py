"""The recipe's `objective` section (see core/config.py): what training minimises, as data. docs/objectives.md has the
formulas; core/objectives.py computes them at the model's head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from weftrain.core.formats.safe_names import PlainName
from weftrain.core.formats.strict_model import NonNegative, Positive, StrictModel
from weftrain.core.unlearning_section import (
    MaxEntropyObjective,
    MinPosteriorObjective,
    RandomMatchingObjective,
    RmuObjective,
    UnlearningObjective,
)

Smoothing = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class NextTokenObjective(StrictModel):
    """The tokens' cross entropies, summed over the global batch and divided by `normalizer`.

    bearing_tokens: the number of tokens that bear a loss. all_positions: sequences x length, so that a batch with many
    masked tokens makes a smaller step. Gradient, norm and clipping follow this; the loss that is logged is the mean
    over bearing tokens in either case. Held-out loss is the plain cross entropy, whatever the keys below say.
    """

    name: Literal["next_token"] = "next_token"
    normalizer: Literal["bearing_tokens", "all_positions"] = "bearing_tokens"
    z_loss: NonNegative = 0.0  # times the square of each bearing token's log-normaliser (arXiv 2204.02311)
    label_smoothing: Smoothing = 0.0  # the share of each label that is spread over the whole vocabulary
    # true: each token's loss is multiplied by the weight that the dataset has for it, and the divisor stays as it is.
    # false: weights of the dataset do not count. Without the key a dataset that has any is refused
    token_weights: bool | None = None

    measures: ClassVar[tuple[str, ...]] = ()
    reference: ClassVar[str | None] = None  # stored log-probabilities that it is held against
    keeps_first_model: ClassVar[bool] = False  # whether it reads the model that the run began with

    @property
    def ends_at(self) -> int | None:
        """The boundary between blocks (core/objective_parts.py:StateLoss) behind which training computes nothing."""
        return None

    @property
    def terms(self) -> dict[str, float]:
        """What the op linear_cross_entropy is asked for in every call, beside the plain cross entropy."""
        found = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing}
        return {name: value for name, value in found.items() if value}

    @property
    def weighs_tokens(self) -> bool:
        return bool(self.token_weights)

    @property
    def features(self) -> tuple[str, ...]:
        """What a backend must be able to do (core/backend.py:Feature)."""
        return (*self.terms, *(("token_weights",) if self.token_weights else ()))

    @property
    def divides_by_positions(self) -> bool:
        """The divisor is the same for every batch, whatever its loss mask."""
        return self.normalizer == "all_positions"

    def divisor(self, bearing_tokens: int, positions: int, rows: int) -> int:
        """What the gradient is divided by: of the global batch, its bearing tokens, all its positions and its rows."""
        return positions if self.divides_by_positions else bearing_tokens

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the later keys at their defaults: a recipe that does not use them has the hash it had before."""
        later = {"z_loss": 0.0, "label_smoothing": 0.0, "token_weights": None}
        return {key: value for key, value in handler(self).items() if key not in later or value != later[key]}


class DpoObjective(StrictModel):
    """Direct preference optimisation: the mean over pairs of rows, the first chosen and the second rejected.

    With h = the chosen row's log(p / reference) minus the rejected row's, summed over the tokens that bear a loss:
    sigmoid is -log sigmoid(beta h) (arXiv 2305.18290), ipo is (h - 1 / (2 beta))^2 (arXiv 2310.12036).
    """

    name: Literal["dpo"]
    beta: Positive
    form: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, allow_inf_nan=False)] = 0.0  # probability of a swapped pair
    length_normalized: bool = False  # log-probabilities are means over a row's bearing tokens, not sums
    reference: PlainName  # the stored log-probabilities of the frozen reference: `weftrain data reference`

    # each the mean over pairs
    measures: ClassVar[tuple[str, ...]] = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
    terms: ClassVar[dict[str, float]] = {}
    features: ClassVar[tuple[str, ...]] = ("dpo",)
    divides_by_positions: ClassVar[bool] = False
    weighs_tokens: ClassVar[bool] = True  # the gradient is that of weighted cross entropies
    keeps_first_model: ClassVar[bool] = False

    @property
    def ends_at(self) -> int | None:
        """See NextTokenObjective.ends_at."""
        return None

    def divisor(self, bearing_tokens: int, positions: int, rows: int) -> int:
        """See NextTokenObjective.divisor: the pairs."""
        return rows // 2

    @model_validator(mode="after")
    def _check(self) -> DpoObjective:
        if self.label_smoothing and self.form == "ipo":
            raise ValueError("'label_smoothing' is of form sigmoid: leave it out, or set form: sigmoid")
        return self


Objective = (
    NextTokenObjective
    | DpoObjective
    | MaxEntropyObjective
    | MinPosteriorObjective
    | RandomMatchingObjective
    | RmuObjective
)
# of all objectives: keys of lines of metrics
MEASURES = (*DpoObjective.measures, *UnlearningObjective.measures)


def _named(value: Any) -> Any:
    """A section without a name is of next_token, as those of earlier records are."""
    return {"name": "next_token", **value} if isinstance(value, Mapping) else value


ObjectiveConfig = Annotated[Annotated[Objective, Field(discriminator="name")], BeforeValidator(_named)]


def check_objective(
    objective: Objective, *, global_batch: int, micro_batch: int, pieces: int | None, document_attention: bool
) -> None:
    """Raises ValueError for batches and data that the objective cannot be of. pieces: those that a row of the datasets
    is cut into; None: rows without a dataset.
    """
    if objective.name != "dpo":
        return
    for key, size in (("global_batch_size", global_batch), ("micro_batch_size", micro_batch)):
        if size % 2:
            raise ValueError(f"batch.{key} {size} is odd, and objective dpo reads pairs of rows: make it even")
    if pieces not in (None, 2):
        raise ValueError(
            "objective dpo reads each row of a dataset of pairs in two pieces, chosen and rejected: set "
            "data.row_length to 2 x data.sequence_length"
        )
    if document_attention:
        raise ValueError(
            "data.document_attention is of rows that several documents share, and each row of objective dpo is one "
            "answer: leave it out"
        )
