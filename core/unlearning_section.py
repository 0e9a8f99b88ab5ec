"""Objectives of unlearning (see core/objectives_section.py): rows of some sources are to be forgotten, the others kept.

The definitions are those of LLM360's Analysis360 (analysis/unlearning) and, of RMU, arXiv 2403.03218; docs/safety.md
says what differs. core/unlearning.py computes them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from weftrain.core.formats.safe_names import PlainName
from weftrain.core.formats.strict_model import Count, NonNegative, Positive, Seed, StrictModel
from weftrain.core.parameters import ParameterSpec


class UnlearningObjective(StrictModel):
    """forget_weight x the forget loss of the tokens of some sources + retain_weight x the loss of all others, divided
    by the tokens of the global batch that bear a loss.

    Held-out loss is the plain cross entropy of each set.
    """

    name: str
    forget: Annotated[tuple[PlainName, ...], Field(strict=False, min_length=1)]  # names of data.sources
    forget_weight: Positive = 1.0
    retain_weight: NonNegative = 1.0

    measures: ClassVar[tuple[str, ...]] = ("forget_loss", "retain_loss")  # means over the tokens of each kind
    terms: ClassVar[dict[str, float]] = {}
    features: ClassVar[tuple[str, ...]] = ("forget",)
    divides_by_positions: ClassVar[bool] = False
    weighs_tokens: ClassVar[bool] = False
    reference: ClassVar[str | None] = None
    keeps_first_model: ClassVar[bool] = False

    @property
    def ends_at(self) -> int | None:
        """See NextTokenObjective.ends_at."""
        return None

    def divisor(self, bearing_tokens: int, positions: int, rows: int) -> int:
        """See NextTokenObjective.divisor."""
        return bearing_tokens


class MaxEntropyObjective(UnlearningObjective):
    """Forget: the negative entropy of the next token's distribution. Retain: the cross entropy."""

    name: Literal["max_entropy"]


class MinPosteriorObjective(UnlearningObjective):
    """Forget: -log(1 - p) of each label; of labels with log p below `threshold`, which are forgotten, none. Retain: the
    cross entropy.
    """

    name: Literal["min_posterior"]
    threshold: Annotated[float, Field(lt=0, allow_inf_nan=False)] = -15.0


class RandomMatchingObjective(UnlearningObjective):
    """Forget: 1 - |cosine| of each hidden state and a random vector of its input token, the mean over embedding, blocks
    and final norm. Retain: the cross entropy.
    """

    name: Literal["random_matching"]
    vector_seed: Seed = 42

    features: ClassVar[tuple[str, ...]] = ("forget", "hidden_states")


class RmuObjective(UnlearningObjective):
    """Representation misdirection: forget: the mean square distance of the output of block `layer` from `steering` x a
    random unit vector; retain: from the output of the same block of the model that the run began with, which is kept.

    Nothing behind that block has a gradient: `freeze_beyond` freezes it.
    """

    name: Literal["rmu"]
    layer: Count  # from 0
    steering: Positive = 1.0
    retain_weight: NonNegative = 10.0  # alpha
    vector_seed: Seed = 42

    features: ClassVar[tuple[str, ...]] = ("forget", "hidden_states", "frozen_model")
    keeps_first_model: ClassVar[bool] = True

    @property
    def ends_at(self) -> int:
        """See NextTokenObjective.ends_at."""
        return self.layer + 1


Unlearning = MaxEntropyObjective | MinPosteriorObjective | RandomMatchingObjective | RmuObjective


def freeze_beyond(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's tree in which `tuning.freeze` names what objective rmu gives no gradient: all behind its layer.

    Of adapters alone nothing else is trained. What is no recipe is left to those who check it.
    """
    sections = [tree.get(name) for name in ("objective", "model", "tuning")]
    objective, model, tuning = (dict(one) if isinstance(one, Mapping) else {} for one in sections)
    layer, layers, freeze = objective.get("layer"), model.get("num_layers"), tuning.get("freeze")
    if objective.get("name") != "rmu" or type(layer) is not int or type(layers) is not int:
        return tree
    if (tuning.get("lora") and freeze is None) or not isinstance(freeze, list | tuple | None):
        return tree
    beyond = [f"layers.{number}" for number in range(layer + 1, layers)] + ["final_norm"]
    beyond += [] if model.get("tie_embeddings") else ["head"]
    named = list(freeze or ())
    named += [one for one in beyond if one not in named]
    return {**tree, "tuning": {**tuning, "freeze": named}}


def check_unlearning(
    objective: Any, sources: Collection[str] | None, num_layers: int, parameters: Collection[ParameterSpec]
) -> None:
    """Raises ValueError for sources or a layer that are not there, and for adapters that would have no gradient.
    sources: None, random rows of which every second is to be forgotten. parameters: Recipe.parameters.
    """
    if not isinstance(objective, UnlearningObjective):
        return
    if isinstance(objective, RmuObjective):
        if objective.layer >= num_layers:
            raise ValueError(f"objective.layer {objective.layer}: the model has layers 0..{num_layers - 1}")
        reached = ("embedding.", *(f"layers.{number}." for number in range(objective.ends_at)))
        beyond = [spec.name for spec in parameters if spec.trained and not spec.name.startswith(reached)]
        if beyond:
            raise ValueError(
                f"objective.layer {objective.layer}: {beyond[0]} lies behind that block and has no gradient: name "
                "modules of earlier layers in tuning.lora.targets, or freeze it in tuning.freeze"
            )
    if sources is None:
        return
    if unknown := [name for name in objective.forget if name not in sources]:
        raise ValueError(f"objective.forget: '{unknown[0]}' is no source of the recipe: there are {', '.join(sources)}")
    if set(sources) <= set(objective.forget) and objective.retain_weight:
        raise ValueError(
            "objective.forget names every source, and none is left to be kept: add one to data.sources, or set "
            "objective.retain_weight to 0"
        )
