"""What an objective is given at the head and between the blocks, and what it is to them: see core/objectives.py."""

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
    """What an objective is given of a micro-batch besides labels (core/order/batch.py)."""

    token_weights: Tensor | None = None  # fp32 [B, T]
    reference: Tensor | None = None  # float64 [B]
    forget: Tensor | None = None  # bool [B]
    # where states have a loss, in the forward pass alone:
    ids: Tensor | None = None  # int64 [B, T]
    # [B, T, C], of an objective that keeps the model that the run began with: that model's state at `StateLoss.last`
    frozen: Tensor | None = None


class SequenceShare(Protocol):
    """Ranks that have a part of every row's tokens each."""

    reports: bool  # one of them: it has the loss, of which the sum over ranks is made

    def sum(self, of_rows: Tensor) -> Tensor:
        """The sum over the ranks, on each of them. Nothing is differentiated."""
        ...


class StateLoss(Protocol):
    """A loss of the residual stream between the blocks, in training alone. Boundary 0 is the embedding's output, and
    boundary b that of block b - 1.

    last: the boundary behind which training computes nothing, so that the head returns nothing; None: there is none.
    """

    last: int | None

    def reads(self, boundary: int) -> bool: ...

    def __call__(self, boundary: int, state: Tensor, labels: Tensor, extras: Extras | None) -> Tensor:
        """state [B, T, C], labels int64 [B, T], extras with ids -> fp32 [1 + measures, 2], to be added to what
        the HeadLoss returns. It depends on the tokens one by one, so ranks may have some of a row's tokens each.
        """
        ...


class HeadLoss(Protocol):
    """A loss at the head, of hidden [B, T, C] in the weight's dtype and labels int64 [B, T] (-100: no loss).

    Returns an fp32 scalar, the sum of the token losses; or fp32 [1 + measures, 2], for the loss and for each measure
    its sum and what it is the mean over. The loss alone has a gradient. states: the part of the objective that is of
    states between the blocks.
    """

    share: SequenceShare | None
    states: StateLoss | None

    def __call__(self, losses: TokenLosses, hidden: Tensor, labels: Tensor, extras: Extras | None) -> Tensor: ...
