"""The losses of unlearning at the head (core/unlearning_section.py; core/objective_parts.py:HeadLoss).

max_entropy and min_posterior need the logits of the forget tokens, in blocks that are computed again in the backward;
random_matching and rmu need hidden states, which a backend with the feature `hidden_states` gives in Extras. What is
kept is trained by the same op as next_token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weftrain.core.objective_parts import Extras, SequenceShare, TokenLosses
from weftrain.core.unlearning_section import (
    MinPosteriorObjective,
    RandomMatchingObjective,
    RmuObjective,
    Unlearning,
)

_LOGITS_AT_ONCE = 1 << 25  # fp32 values: 128 MiB

# (logits fp32 [n, V], labels int64 [n]) -> fp32 [n]
OfLogits = Callable[[Tensor, Tensor], Tensor]


class UnlearningLoss:
    """The forget loss of marked rows, and another of the rest: fp32 [3, 2], for the loss, forget_loss and retain_loss
    the sum and the number of tokens.
    """

    share: SequenceShare | None = None  # sums over tokens are added like those of next_token: nothing else is shared

    def __init__(self, objective: Unlearning) -> None:
        self._objective = objective
        self._vectors: Tensor | None = None  # drawn at the first use

    def __call__(self, losses: TokenLosses, hidden: Tensor, labels: Tensor, extras: Extras | None) -> Tensor:
        bearing = labels >= 0
        if not torch.is_grad_enabled():  # held-out loss, which compares with that of any other run
            loss = losses(hidden.flatten(0, -2), labels.flatten())
            table = torch.zeros(3, 2, device=hidden.device)
            table[0, 0], table[0, 1] = loss, bearing.sum()
            return table
        if extras is None or extras.forget is None:
            raise ValueError(f"objective {self._objective.name}: the batch does not say which rows are to be forgotten")
        forget = bearing & extras.forget[:, None]
        retain = bearing & ~extras.forget[:, None]
        kept = losses(hidden.flatten(0, -2), labels.masked_fill(~retain, -100).flatten())
        if isinstance(self._objective, RmuObjective):
            forgetting, retaining = self._rmu(self._objective, forget, retain, extras)
            unused = 0.0 * kept  # parameters beyond the layer have a gradient of zero, and not none
        else:
            forgetting, retaining = self._forget(self._objective, losses, hidden, labels, forget, extras), kept
            unused = torch.zeros_like(kept)
        weights = self._objective.forget_weight, self._objective.retain_weight
        loss = weights[0] * forgetting + weights[1] * retaining + unused
        counts = torch.stack([bearing.sum(), forget.sum(), retain.sum()]).float()
        return torch.stack([torch.stack([loss, forgetting.detach(), retaining.detach()]), counts], 1)

    def _forget(
        self, objective: Unlearning, losses: TokenLosses, hidden: Tensor, labels: Tensor, forget: Tensor, extras: Extras
    ) -> Tensor:
        """0-dim fp32: the sum over the tokens of `forget`, bool [B, T]."""
        if isinstance(objective, RandomMatchingObjective):
            return self._random_matching(objective, losses.vocab_size, hidden, forget, extras)
        of_logits: OfLogits = negative_entropy
        if isinstance(objective, MinPosteriorObjective):
            of_logits = partial(posterior_loss, threshold=objective.threshold)
        return sum_of_logits(of_logits, losses, hidden[forget], labels[forget])

    def _random_matching(
        self, objective: RandomMatchingObjective, vocab_size: int, hidden: Tensor, forget: Tensor, extras: Extras
    ) -> Tensor:
        if extras.hidden is None or extras.ids is None:
            raise ValueError("objective random_matching: the backend gave no hidden states")
        if self._vectors is None:
            drawn = torch.Generator().manual_seed(objective.vector_seed)
            self._vectors = torch.randn(vocab_size, hidden.shape[-1], generator=drawn).to(hidden.device)
        wanted = self._vectors[extras.ids[forget]]  # [n, C]
        states = (*extras.hidden[:-1], hidden)  # the last is that after the final norm
        distances = [1 - F.cosine_similarity(state[forget].float(), wanted, dim=-1).abs() for state in states]
        return torch.stack(distances).mean(0).sum()

    def _rmu(self, objective: RmuObjective, forget: Tensor, retain: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """0-dim fp32 each: the sums over the tokens of `forget` and `retain` of the mean over channels."""
        if extras.hidden is None or extras.frozen is None:
            raise ValueError("objective rmu: the backend gave no hidden states")
        state = extras.hidden[objective.layer + 1].float()  # [B, T, C]; 0 is the embedding's
        if self._vectors is None:
            drawn = torch.Generator().manual_seed(objective.vector_seed)
            direction = torch.rand(state.shape[-1], generator=drawn)
            self._vectors = (direction / direction.norm() * objective.steering).to(state.device)
        forgetting = (state[forget] - self._vectors).square().mean(-1).sum()
        retaining = (state[retain] - extras.frozen.float()[retain]).square().mean(-1).sum()
        return forgetting, retaining


def negative_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """sum p log p of each row's distribution; labels are not read."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)


def posterior_loss(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """-log(1 - p) of each label, 0 where log p is below the threshold. The others' sum is taken apart, since 1 - p has
    no digits left where p is near 1.
    """
    all_of_them = logits.logsumexp(-1)
    own = logits.gather(-1, labels[:, None])[:, 0]
    others = logits.scatter(-1, labels[:, None], float("-inf")).logsumexp(-1)
    return torch.where(own - all_of_them < threshold, 0.0, all_of_them - others)


@torch.compiler.disable
def sum_of_logits(function: OfLogits, losses: TokenLosses, hidden: Tensor, labels: Tensor) -> Tensor:
    """The sum of a function of logits over the rows of hidden [n, C], labels [n]; the logits exist in blocks only."""

    def of_block(hidden: Tensor, labels: Tensor) -> Tensor:
        return function(losses.logits(hidden).float(), labels).sum()

    block = max(1, _LOGITS_AT_ONCE // losses.vocab_size)
    total = hidden.sum() * 0.0  # without a row the gradient is zero
    total = total.float()
    for first in range(0, len(hidden), block):
        rows = slice(first, first + block)
        total = total + checkpoint(of_block, hidden[rows], labels[rows], use_reentrant=False)  # type: ignore[operator]
    return total
