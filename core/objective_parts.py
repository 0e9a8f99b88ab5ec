"""What an objective is given at the head, and what it is to the head: see core/objectives.py."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class TokenLosses(Protocol):
    """What the head computes of hidden [N, C] in the weight's dtype."""

    @property
    def vocab_size(self) -> int: ...

    def __call__(self, hidden: Tensor, labels: Tensor, **terms: Any) -> Tensor:
        """labels int64 [N], terms of the op linear_cross_entropy -> fp32 scalar, the sum of the token losses."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] in the weight's dtype."""
        ...


class Extras(NamedTuple):
    """What an objective is given of a micro-batch besides ids and labels (core/order/batch.py)."""

    token_weights: Tensor | None = None  # fp32 [B, T]
    reference: Tensor | None = None  # float64 [B]
    forget: Tensor | None = None  # bool [B]
    # of a backend with the feature hidden_states, in the forward pass alone:
    ids: Tensor | None = None  # int64 [B, T]
    hidden: tuple[Tensor, ...] | None = None  # [B, T, C] each: the embedding's output, then each block's
    frozen: Tensor | None = None  # [B, T, C], of objective rmu: block `layer`'s output of the kept model


class SequenceShare(Protocol):
    """Ranks that have a part of every row's tokens each."""

    reports: bool  # one of them: it has the loss, of which the sum over ranks is made

    def sum(self, of_rows: Tensor) -> Tensor:
        """The sum over the ranks, on each of them. Nothing is differentiated."""
        ...


class HeadLoss(Protocol):
    """A loss at the head, of hidden [B, T, C] in the weight's dtype and labels int64 [B, T] (-100: no loss).

    Returns an fp32 scalar, the sum of the token losses; or fp32 [1 + measures, 2], for the loss and for each measure
    its sum and what it is the mean over. The loss alone has a gradient.
    """

    share: SequenceShare | None

    def __call__(self, losses: TokenLosses, hidden: Tensor, labels: Tensor, extras: Extras | None) -> Tensor: ...
