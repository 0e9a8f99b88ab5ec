"""The losses of unlearning at the head and between the blocks (core/unlearning_section.py; core/objective_parts.py).

max_entropy and min_posterior need the logits of the forget tokens, in blocks that are computed again in the backward;
random_matching and rmu are of hidden states, one boundary between two blocks at a time. What is kept is trained by the
same op as next_token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weftrain.core.model_config import ModelConfig
from weftrain.core.objective_parts import Extras, SequenceShare, StateLoss, TokenLosses
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

    def __init__(self, objective: Unlearning, model: ModelConfig) -> None:
        self._objective = objective
        # Left out of compiled code, since it loops over what a batch marks. Not at import: that loads torch's compiler.
        self._sum_of_logits = torch.compiler.disable(sum_of_logits)
        self._matching = RandomMatching(objective, model) if isinstance(objective, RandomMatchingObjective) else None
        self.states: StateLoss | None = self._matching
        if isinstance(objective, RmuObjective):
            self.states = Misdirection(objective, model)

    def __call__(self, losses: TokenLosses, hidden: Tensor, labels: Tensor, extras: Extras | None) -> Tensor:
        bearing = labels >= 0
        if not torch.is_grad_enabled():  # held-out loss, which compares with that of any other run
            loss = losses(hidden.flatten(0, -2), labels.flatten())
            table = torch.zeros(3, 2, device=hidden.device)
            table[0, 0], table[0, 1] = loss, bearing.sum()
            return table
        forget, retain = _marked(self._objective, labels, extras)
        kept = losses(hidden.flatten(0, -2), labels.masked_fill(~retain, -100).flatten())
        forgetting = self._forget(self._objective, losses, hidden, labels, forget, extras)
        return _table(self._objective, forgetting, kept, _counts(forget, retain))

    def _forget(
        self,
        objective: Unlearning,
        losses: TokenLosses,
        hidden: Tensor,
        labels: Tensor,
        forget: Tensor,
        extras: Extras | None,
    ) -> Tensor:
        """0-dim fp32: the sum over the tokens of `forget`, bool [B, T]."""
        if self._matching is not None:  # of the state after the final norm
            return self._matching.distance(hidden, forget, extras)
        of_logits: OfLogits = negative_entropy
        if isinstance(objective, MinPosteriorObjective):
            of_logits = partial(posterior_loss, threshold=objective.threshold)
        total: Tensor = self._sum_of_logits(of_logits, losses, hidden[forget], labels[forget])
        return total


class RandomMatching:
    """Each state is brought near a random vector of its input token. The mean is over embedding, blocks and final norm;
    the last block's output is read after that norm, by the head.
    """

    last: int | None = None

    def __init__(self, objective: RandomMatchingObjective, model: ModelConfig) -> None:
        self._objective, self._states = objective, model.num_layers + 1
        self._shape = model.vocab_size, model.hidden_size
        self._vectors: Tensor | None = None  # drawn at the first use

    def reads(self, boundary: int) -> bool:
        return boundary < self._states - 1

    def __call__(self, boundary: int, state: Tensor, labels: Tensor, extras: Extras | None) -> Tensor:
        forget, _ = _marked(self._objective, labels, extras)
        forgetting = self.distance(state, forget, extras)
        nothing = torch.zeros_like(forgetting)
        return _table(self._objective, forgetting, nothing, nothing.expand(3))  # the head counts the tokens

    def distance(self, state: Tensor, forget: Tensor, extras: Extras | None) -> Tensor:
        """0-dim fp32: the part of one state, [B, T, C], in the sum over the tokens of `forget`, bool [B, T]."""
        if extras is None or extras.ids is None:
            raise ValueError("objective random_matching: the backend gave no ids beside the hidden states")
        if self._vectors is None or self._vectors.device != state.device:
            drawn = torch.Generator().manual_seed(self._objective.vector_seed)
            self._vectors = torch.randn(self._shape, generator=drawn).to(state.device)
        cosine = F.cosine_similarity(state.float(), F.embedding(extras.ids, self._vectors), dim=-1)
        return torch.where(forget, 1 - cosine.abs(), 0.0).sum() / self._states


class Misdirection:
    """The state at `last` is brought near a random direction where it is to be forgotten, and near the state of the
    model that the run began with where it is to be kept.
    """

    def __init__(self, objective: RmuObjective, model: ModelConfig) -> None:
        self._objective = objective
        self.last: int | None = objective.ends_at
        drawn = torch.Generator().manual_seed(objective.vector_seed)  # so no state of its own is to be saved
        direction = torch.rand(model.hidden_size, generator=drawn, device="cpu")
        self._direction = direction / direction.norm() * objective.steering

    def reads(self, boundary: int) -> bool:
        return boundary == self.last

    def __call__(self, boundary: int, state: Tensor, labels: Tensor, extras: Extras | None) -> Tensor:
        if extras is None or extras.frozen is None:
            raise ValueError("objective rmu: the backend gave no state of the model that the run began with")
        forget, retain = _marked(self._objective, labels, extras)
        state, self._direction = state.float(), self._direction.to(state.device)
        forgetting = torch.where(forget, (state - self._direction).square().mean(-1), 0.0).sum()
        retaining = torch.where(retain, (state - extras.frozen.float()).square().mean(-1), 0.0).sum()
        return _table(self._objective, forgetting, retaining, _counts(forget, retain))


def _marked(objective: Unlearning, labels: Tensor, extras: Extras | None) -> tuple[Tensor, Tensor]:
    """bool [B, T] each: the tokens that bear a loss and are to be forgotten, and those to be kept."""
    if extras is None or extras.forget is None:
        raise ValueError(f"objective {objective.name}: the batch does not say which rows are to be forgotten")
    bearing, forget = labels >= 0, extras.forget[:, None]
    return bearing & forget, bearing & ~forget


def _counts(forget: Tensor, retain: Tensor) -> Tensor:
    """fp32 [3]: the tokens of loss, forget_loss and retain_loss."""
    forgotten, kept = forget.sum(), retain.sum()
    return torch.stack([forgotten + kept, forgotten, kept]).float()


def _table(objective: Unlearning, forgetting: Tensor, retaining: Tensor, counts: Tensor) -> Tensor:
    """fp32 [3, 2] of 0-dim sums and counts fp32 [3]."""
    loss = objective.forget_weight * forgetting + objective.retain_weight * retaining
    return torch.stack([torch.stack([loss, forgetting.detach(), retaining.detach()]), counts], 1)


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
