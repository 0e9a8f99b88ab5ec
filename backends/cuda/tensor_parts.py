"""The parts of linear maps (core/parts.py) over tensor ranks, which have so the bits of one process.

Each of T tensor ranks computes P / T consecutive parts of every block, on all tokens of its rows, and adds what they
give; these sums are gathered, which only moves bytes, and each rank adds them in the rest of the tree. All else,
embedding, norms, head and loss, is computed by each of the ranks, on the same tokens and with the same bits: a sum over
tokens that was cut would be another sum.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from weftrain.backends.common.collectives import all_gather
from weftrain.core.blocks import Block
from weftrain.core.experts import MixtureOfExperts
from weftrain.core.parts import Parts, tree_total


class PartsOfRank(Parts):
    """Those that one tensor rank computes."""

    def __init__(self, count: int, group: dist.ProcessGroup) -> None:
        super().__init__(count)
        self._group, self._ranks = group, dist.get_world_size(group)

    @property
    def here(self) -> int:
        return self.count // self._ranks

    def own(self, parameter: Tensor) -> Tensor:
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def total(self, of_parts: Iterable[Tensor]) -> Tensor:
        own = tree_total(of_parts).contiguous()
        found = own.new_empty(self._ranks * own.numel())
        all_gather(found, own.view(-1), group=self._group)
        return tree_total(found.view(self._ranks, *own.shape).unbind())


def split_parts(blocks: Iterable[Block], mesh: DeviceMesh) -> None:
    """Give each tensor rank the rows of q, k, v, gate and up, and the columns of o and down, of its parts."""
    parts: PartsOfRank | None = None
    for block in blocks:
        for module in (block.attention, block.ffn):
            assert not isinstance(module, MixtureOfExperts)  # refused
            assert module.parts is not None
            parts = module.parts = parts or PartsOfRank(module.parts.count, mesh.get_group())
            for name, linear in module.named_children():
                if name.endswith("_proj"):
                    _split(linear, mesh, by_rows=name not in ("o_proj", "down_proj"))


def _split(linear: nn.Module, mesh: DeviceMesh, by_rows: bool) -> None:
    for name, parameter in list(linear.named_parameters(recurse=False)):
        # a bias of what is added up is added once, to the sum, on each rank
        placement = Shard(0) if by_rows else Shard(1) if parameter.ndim == 2 else Replicate()
        cut = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        linear.register_parameter(name, nn.Parameter(cut, parameter.requires_grad))
