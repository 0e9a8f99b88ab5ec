"""Rows whose tokens lie on several ranks, for an objective that depends on a row's sum over its tokens."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from weftrain.backends.cuda.parallel import Degrees
from weftrain.core.model import Decoder, Head


class RowShare:
    """This rank's share of its rows (core/objectives.py:SequenceShare). A collective."""

    def __init__(self, shape: Degrees, device_type: str) -> None:
        mesh = init_device_mesh(device_type, (shape.data, shape.sequence), mesh_dim_names=("data", "sequence"))
        self._group = mesh["sequence"].get_group()
        self.reports = mesh["sequence"].get_local_rank() == 0

    def sum(self, of_rows: Tensor) -> Tensor:
        total = of_rows.clone()
        dist.all_reduce(total, group=self._group)
        return total


def share_rows(model: Decoder, shape: Degrees, device_type: str) -> None:
    """Give the head of such a rank what it needs."""
    head = model.segments()[-1]
    assert isinstance(head, Head)
    head.loss.share = RowShare(shape, device_type)
