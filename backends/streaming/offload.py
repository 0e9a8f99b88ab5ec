"""Keeps what autograd saves of a block in host memory, except weights: a view of a slot is valid again with its layer.

On a CUDA device it leaves on the stream that gradients leave on. In backward what the next block or micro-batch needs
comes back while this one computes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from weftrain.backends.streaming.device import Copies, Held

Unit = tuple[int, int]  # record and micro-batch


class Offload:
    """slots: the addresses of memory that holds weights."""

    def __init__(self, copies: Copies, slots: Callable[[], set[int]]) -> None:
        self._copies, self._slots = copies, slots
        self._units: dict[Unit, list[Held]] = {}
        self._brought: set[Unit] = set()

    def block(self, record: int) -> AbstractContextManager[Any]:
        """Around the forward of the next micro-batch of a record."""
        unit = record, sum(held == record for held, _ in self._units)
        kept, slots = self._units.setdefault(unit, []), self._slots()

        def pack(tensor: Tensor) -> Held | Tensor:
            if isinstance(tensor, nn.Parameter) or tensor.untyped_storage().data_ptr() in slots:
                return tensor
            kept.append(self._copies.send_away(tensor))
            return kept[-1]

        def unpack(saved: Held | Tensor) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            self._bring(unit)
            self._bring(self._next(unit))
            return self._copies.returned(saved)

        return saved_tensors_hooks(pack, unpack)

    def _next(self, unit: Unit) -> Unit:
        """What is needed after a unit: backward goes through the records in reverse, and the micro-batches in order."""
        record, number = unit
        return (record, number + 1) if (record, number + 1) in self._units else (record - 1, 0)

    def _bring(self, unit: Unit) -> None:
        if unit not in self._brought:
            self._brought.add(unit)
            for held in self._units.get(unit, ()):
                self._copies.bring_back(held)

    def end(self) -> None:
        """After a pass: nothing of it is needed any more."""
        self._units.clear()
        self._brought.clear()
        self._copies.forget_held()
