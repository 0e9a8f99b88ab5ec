"""The first layers of the model that a run began with, kept for objective rmu beside those that are trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from weftrain.backends.common.step import Rows
from weftrain.core.model import Decoder
from weftrain.core.rotary import Rotary


class FrozenLayers:
    """A copy of embedding and blocks 0..layer in the dtype that they are computed with."""

    def __init__(self, model: Decoder, layer: int) -> None:
        segments = model.segments()
        self._segments = [copy.deepcopy(segment).requires_grad_(False) for segment in segments[: layer + 2]]

    @torch.no_grad()
    def state(self, rows: Rows, rotary: Sequence[Rotary | None]) -> torch.Tensor:
        """[B, T, C]: the output of block `layer`."""
        embedding, *blocks = self._segments
        x: torch.Tensor = embedding(rows.ids, None)
        for number, block in enumerate(blocks):
            x = block(x, rotary[number], rows.document_start, None)
        return x
