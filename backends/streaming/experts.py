"""Which weights of a layer with experts are copied to a device again for backward: not those of experts without tokens.

A forward pass notes the experts that its micro-batches reach. Backward routes as forward did, so the weights of the
others stay away: no product reads them. Forward copies all of a layer: copies run ahead of the layers, and so of their
routers. The store reads all of a layer from the disk (docs/mixture-of-experts.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from weftrain.backends.streaming.device import Copies
from weftrain.backends.streaming.schedule import Event
from weftrain.backends.streaming.store.layout import Record, Tile
from weftrain.core.experts import ExpertFeedForwards, MixtureOfExperts


class ReachedExperts:
    """For the segments of a model whose weights are copied, each of which is a record of the store."""

    def __init__(self, segments: Sequence[nn.Module], copies: Copies) -> None:
        self._copies = copies
        self._reached: dict[int, Tensor] = {}  # record -> bool [E], on the device that computes
        self._noted: dict[int, Callable[[], list[bool]]] = {}  # the same on the host
        self._known: dict[int, list[bool]] = {}
        self.left_out_bytes = 0  # of this pass's copies
        for index, segment in enumerate(segments):
            if isinstance(ffn := getattr(segment, "ffn", None), MixtureOfExperts):
                ffn.experts.through = partial(self._through, index, ffn.experts)  # type: ignore[method-assign]

    def _through(self, index: int, experts: ExpertFeedForwards, rows: Tensor, ends: Tensor) -> Tensor:
        """`ExpertFeedForwards.through`, noting the experts of rows."""
        if torch.is_grad_enabled() and index not in self._known:  # once known, forward is over
            here = ends.diff(prepend=ends.new_zeros(1)) > 0
            reached = self._reached[index] = here | self._reached[index] if index in self._reached else here
            self._noted[index] = self._copies.noted(reached)
        return ExpertFeedForwards.through(experts, rows, ends)

    def begin(self) -> None:
        """A pass begins: it has reached no expert, and left nothing out."""
        self._reached.clear()
        self._noted.clear()
        self._known.clear()
        self.left_out_bytes = 0

    def parts(self, event: Event, tile: Tile) -> list[slice]:
        """Bytes of a tile's weights that are copied."""
        if not event.again or (reached := self._reached_of(event.record)) is None:
            return [slice(0, tile.compute_bytes)]
        item, runs = tile.compute_bytes // tile.elements, _runs(event.record, tile, reached)
        self.left_out_bytes += tile.compute_bytes - item * sum(stop - start for start, stop in runs)
        return [slice(start * item, stop * item) for start, stop in runs]

    def _reached_of(self, record: Record) -> list[bool] | None:
        """Of each of a record's experts, whether forward reached it; None: the record has none, or no forward."""
        if record.index not in self._noted:
            return None
        if record.index not in self._known:
            self._known[record.index] = self._noted[record.index]()
        return self._known[record.index]


def _runs(record: Record, tile: Tile, reached: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last elements of what a tile has beside the weights of experts that were not reached."""
    shapes, runs = {spec.name: spec.shape for spec in record.specs}, list[tuple[int, int]]()
    for fragment in tile.fragments:
        parts, shape = [(fragment.start, fragment.stop)], shapes[fragment.name]
        if len(shape) == 3:  # [E, out, in]
            each, (first, stop) = shape[1] * shape[2], parts.pop()
            numbers = [number for number, wanted in enumerate(reached) if wanted]
            parts = [(max(first, each * number), min(stop, each * (number + 1))) for number in numbers]
        for first, stop in parts:
            if first < stop:
                shift = fragment.offset - fragment.start
                start = runs.pop()[0] if runs and runs[-1][1] == first + shift else first + shift
                runs.append((start, stop + shift))
    return runs
