"""Losses of the residual stream between the blocks, of one micro-batch (core/objective_parts.py:StateLoss)."""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.core.objective_parts import Extras, StateLoss


class StateLosses:
    """Is shown each state that a forward pass of training goes on with, and adds up what is returned of it.

    In evaluation, where no gradients are recorded, no state has a loss: held-out loss is the head's.
    """

    def __init__(self, loss: StateLoss | None, ids: Tensor, labels: Tensor, extras: Extras | None) -> None:
        self._loss = loss if torch.is_grad_enabled() else None
        self._labels = labels
        self._total: list[Tensor] = []
        self.extras = extras if self._loss is None else with_ids(extras, ids)  # for the head

    @property
    def last(self) -> int | None:
        """The boundary behind which nothing is computed; None: blocks and head are, all of them."""
        return None if self._loss is None else self._loss.last

    def of(self, boundary: int, state: Tensor) -> Tensor:
        """The state, [B, T, C], to go on with.

        Loss and caller get a view each, so that the gradient of all that follows and that of this loss are added up
        for themselves before the two are added: that is the order of a backend which computes them apart.
        """
        if self._loss is None or not self._loss.reads(boundary):
            return state
        self._total.append(self._loss(boundary, state.view_as(state), self._labels, self.extras))
        return state.view_as(state)

    def with_head(self, sums: Tensor) -> Tensor:
        """What the head returned, and what the states gave."""
        return added([*self._total, sums])

    def alone(self) -> Tensor:
        """What the states gave, where the head gives nothing."""
        return added(self._total)


def with_ids(extras: Extras | None, ids: Tensor) -> Extras:
    """Extras with the micro-batch's ids, int64 [B, T]."""
    return (Extras() if extras is None else extras)._replace(ids=ids)


def added(parts: list[Tensor]) -> Tensor:
    """The sum of what states and head returned, in the order of the forward pass."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
