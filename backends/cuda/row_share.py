"""Rows whose tokens lie on several ranks, for what depends on a row's sum over its tokens: objectives, and the loss
that balances experts.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.meshes import mesh_of
from weftrain.core.experts import mixtures_of
from weftrain.core.model import Decoder, Head


class RowShare:
    """This rank's share of its rows (core/objective_parts.py:SequenceShare). A collective."""

    def __init__(self, shape: Degrees, device_type: str, timeout_s: float) -> None:
        of = (shape.data, shape.sequence), ("data", "sequence")
        mesh = mesh_of(device_type, *of, timeout_s, shape.pipeline)
        self._group = mesh["sequence"].get_group()
        self.reports = mesh["sequence"].get_local_rank() == 0

    def sum(self, of_rows: Tensor) -> Tensor:
        total = of_rows.clone()
        dist.all_reduce(total, group=self._group)
        return total


def share_rows(model: Decoder, shape: Degrees, device_type: str, timeout_s: float) -> None:
    """Give the head and the routers of such a rank what they need."""
    head = model.segments()[-1]
    assert isinstance(head, Head)
    share = head.loss.share = RowShare(shape, device_type, timeout_s)
    for mixture in mixtures_of(model).values():
        mixture.share = share
