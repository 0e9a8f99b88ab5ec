"""Tied embeddings in a pipeline: the first stage has the weight for the embedding and the last for the head.

Each keeps it whole or sharded as any other of its weights, with moments of its own. The gradients of the two uses are
added once a step, between the ranks with the same place in the two stages, which hold the same piece; a sum of two
numbers has the same bits in either order, so both update their copies alike.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.meshes import group_among

TIED = "embedding.weight"


class TiedEmbedding:
    """This rank's exchange with the other stage that has the weight. A collective of all ranks."""

    def __init__(self, shape: Degrees, timeout_s: float) -> None:
        ranks = torch.arange(shape.size).view(shape.pipeline, shape.stage_ranks)
        self._group = group_among(ranks[[0, -1]].T, timeout_s)  # no schedule here has both stages on one rank but zbv

    def add(self, gradients: dict[str, Tensor]) -> None:
        """Put the sum of both uses in the place of this rank's piece of the gradient, in its dtype; fp32 is added. A
        collective of the ranks of the first and the last stage.
        """
        if self._group is None:
            return
        total = gradients[TIED].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        gradients[TIED] = total.to(gradients[TIED].dtype)
