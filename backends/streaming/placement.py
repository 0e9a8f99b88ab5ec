"""What stays in device memory, and what is streamed through it. No torch.

The planner chooses a placement (planner.py); schedule, store and executor follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from weftrain.backends.streaming.store.layout import Layout, Record
from weftrain.backends.streaming.store.state_format import ITEM_BYTES


@dataclass(frozen=True)
class Placement:
    """Records are given by their index.

    layer_slots: slots that streamed layers share; 0: weights are used in the store's memory. apart: the device has a
    memory of its own, so weights and gradients are copied. states: records whose weights, moments and gradients stay
    on the device. gradients: further records whose gradients wait there for their update.
    """

    layer_slots: int = 0
    apart: bool = False
    states: frozenset[int] = frozenset()
    gradients: frozenset[int] = frozenset()

    def keeps_gradient(self, record: Record) -> bool:
        return record.index in self.states or record.index in self.gradients


@dataclass(frozen=True)
class Slots:
    """Where each record's weights lie on the device: a number, which never changes."""

    layout: Layout
    placement: Placement

    @cached_property
    def _numbers(self) -> list[int]:
        shared, last = max(self.placement.layer_slots, 1), len(self.layout.records) - 1
        found, streamed = [], 0
        for record in self.layout.records:
            if record.index in (0, last):
                found.append(min(record.index, 1))
            elif record.index in self.placement.states:
                found.append(2 + shared + record.index)
            else:
                found.append(2 + streamed % shared)
                streamed += 1
        return found

    def number(self, record: Record) -> int:
        """Embedding, head and each layer that stays on the device have one each; the others share theirs in turn."""
        return self._numbers[record.index]

    @cached_property
    def kept_until_backward(self) -> frozenset[int]:
        """Layers whose weights are not overwritten between forward and backward."""
        streamed = [r.index for r in self.layout.trained_through if r.index not in self.placement.states]
        last = streamed[-self.placement.layer_slots :] if self.placement.layer_slots else []
        return frozenset(last) | self.placement.states


def gradient_bytes(record: Record) -> int:
    """Bytes of a record's gradients as the pass computes them, without padding."""
    return sum(
        (fragment.stop - fragment.start) * ITEM_BYTES[tile.gradient_dtype]
        for tile in record.tiles
        for fragment in tile.fragments
        if tile.trained
    )


def device_state_bytes(record: Record) -> int:
    """Device memory of a record whose state stays there."""
    return sum(tile.bytes + tile.gradient_bytes for tile in record.tiles)
