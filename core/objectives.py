"""What the head computes of the recipe's objective: one number, or for an objective with measures a small table.

Every loss here is made of calls of one op, the sum of the tokens' cross entropies, so that every kernel and every
backend trains every objective; those of core/unlearning.py read logits or hidden states besides. docs/objectives.md has
the formulas and their sources.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.core.model_config import ModelConfig
from weftrain.core.objective_parts import Extras, HeadLoss, SequenceShare, StateLoss, TokenLosses
from weftrain.core.objectives_section import DpoObjective, NextTokenObjective, Objective
from weftrain.core.unlearning import UnlearningLoss

NEXT_TOKEN = NextTokenObjective()


def head_loss(objective: Objective, model: ModelConfig) -> HeadLoss:
    if isinstance(objective, NextTokenObjective):
        return NextTokenLoss(objective)
    return DpoLoss(objective) if isinstance(objective, DpoObjective) else UnlearningLoss(objective, model)


class NextTokenLoss:
    """The sum of cross entropies; where gradients are recorded, with the objective's terms and weights."""

    share: SequenceShare | None = None
    states: StateLoss | None = None

    def __init__(self, objective: NextTokenObjective) -> None:
        self._terms, self._weighs = objective.terms, objective.weighs_tokens

    def __call__(self, losses: TokenLosses, hidden: Tensor, labels: Tensor, extras: Extras | None) -> Tensor:
        hidden, labels = hidden.flatten(0, -2), labels.flatten()  # [B, T, C] -> [B T, C]
        if not torch.is_grad_enabled():  # held-out loss, which compares with that of any other run
            return losses(hidden, labels)
        if not self._weighs:
            return losses(hidden, labels, **self._terms)
        if extras is None or extras.token_weights is None:
            raise ValueError("objective.token_weights: the batch has no token weights")
        return losses(hidden, labels, **self._terms, token_weights=extras.token_weights.flatten())


class DpoLoss:
    """The sum over pairs of the DPO or IPO loss, with rewards: rows 2 p and 2 p + 1 are chosen and rejected.

    A pair's loss depends on the tokens through two sums alone. So each row's sum comes from a first pass of the op
    without gradients, the slope of the loss in it from a formula, and the gradient of all parameters from a second pass
    in which the tokens of each row are weighted by its slope. A pair of which no token bears a loss does not count.
    """

    share: SequenceShare | None = None
    states: StateLoss | None = None

    def __init__(self, objective: DpoObjective) -> None:
        self._objective = objective

    def __call__(self, losses: TokenLosses, hidden: Tensor, labels: Tensor, extras: Extras | None) -> Tensor:
        if extras is None or extras.reference is None:
            raise ValueError("objective dpo: the batch has no log-probabilities of a reference")
        found, tokens = row_log_probabilities(losses, hidden, labels), (labels >= 0).sum(1).double()
        if self.share is not None:
            found, tokens = self.share.sum(torch.stack([found, tokens])).unbind()
        empty = tokens.unflatten(0, (-1, 2)).sum(1) == 0  # [pairs]
        per_row = torch.ones_like(tokens)
        if self._objective.length_normalized:
            per_row = torch.where(empty.repeat_interleave(2), per_row, tokens)
        ratios = (found - extras.reference) / per_row  # log(p / reference) of each row
        chosen, rejected = ratios.unflatten(0, (-1, 2)).unbind(1)
        beta, margin = self._objective.beta, chosen - rejected
        loss, slope = self._pair_loss(margin)
        table = torch.stack([loss, beta * chosen, beta * rejected, beta * margin, (margin > 0).double()])
        table = table.masked_fill(empty, 0.0).sum(1)
        sums = torch.stack([table, (~empty).sum().double().expand(len(table))], 1).float()  # [1 + measures, 2]
        if self.share is not None and not self.share.reports:
            sums = torch.zeros_like(sums)
        if not torch.is_grad_enabled():
            return sums
        of_rows = torch.stack([-slope, slope], 1).masked_fill(empty[:, None], 0.0).flatten() / per_row
        weights = of_rows.float()[:, None].expand(labels.shape).flatten()  # [B] -> [B T]
        surrogate = losses(hidden.flatten(0, -2), labels.flatten(), token_weights=weights)
        # its value is of no interest, its gradient is the loss's
        gradient = (surrogate - surrogate.detach()).reshape(1, 1)
        return sums + F.pad(gradient, (0, 1, 0, len(table) - 1))

    def _pair_loss(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        """float64 [pairs] -> each pair's loss, and its derivative in the margin of the log ratios."""
        beta, swapped = self._objective.beta, self._objective.label_smoothing
        if self._objective.form == "ipo":
            distance = margin - 1 / (2 * beta)
            return distance.square(), 2 * distance
        logits = beta * margin
        loss = -(1 - swapped) * F.logsigmoid(logits) - swapped * F.logsigmoid(-logits)
        return loss, beta * (swapped * torch.sigmoid(logits) - (1 - swapped) * torch.sigmoid(-logits))


@torch.no_grad()
def row_log_probabilities(losses: TokenLosses, hidden: Tensor, labels: Tensor) -> Tensor:
    """hidden [B, T, C], labels int64 [B, T] -> float64 [B]: the log-probability of each row's bearing tokens."""
    return -torch.stack([losses(row, of_row) for row, of_row in zip(hidden, labels, strict=True)]).double()


def loss_of(sums: Tensor) -> Tensor:
    """The loss in what a HeadLoss returned, 0-dim."""
    return sums if sums.ndim == 0 else sums[0, 0]


def measures_of(objective: Objective, sums: Tensor) -> dict[str, Tensor]:
    """The means of the objective's measures, 0-dim each, of what HeadLoss returned or of the sum of several."""
    return {name: sums[1 + at, 0] / sums[1 + at, 1] for at, name in enumerate(objective.measures)}
