"""Muon's matrices over ranks: each is whole on one rank while its product is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from weftrain.backends.common.muon import Orthogonal, Whole
from weftrain.backends.cuda.models import RankModel
from weftrain.backends.cuda.world import World


def over_ranks(
    world: World,
    model: RankModel,
    shapes: Mapping[str, tuple[int, ...]],
    group: dist.ProcessGroup | None = None,
) -> Callable[[Whole], Orthogonal]:
    """Of as many matrices as there are ranks each rank computes one. A momentum is gathered on all ranks and kept on
    one, and the result is sent to all, so that a rank holds two whole matrices at a time. The product is one process's:
    its bits depend neither on the number of ranks nor on how tensors are cut. shapes: of the whole parameters that this
    rank has a part of. group: the ranks that have a part of the same ones; None: all ranks.
    """
    size, own = dist.get_world_size(group), dist.get_rank(group)

    def spread(orthogonal: Whole) -> Orthogonal:
        def each(names: Sequence[str], momentum: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
            names = [name for name in names if name in shapes]
            for first in range(0, len(names), size):
                turn, mine = names[first : first + size], None
                with world.together("gather the momenta of Muon's matrices"):
                    for owner, name in enumerate(turn):
                        whole = model.whole(name, momentum(name))
                        if owner == own:
                            mine = orthogonal(whole).to(world.device, torch.float32).contiguous()
                for owner, name in enumerate(turn):
                    found = mine if owner == own else None
                    if found is None:
                        found = torch.empty(shapes[name], device=world.device)
                    if size > 1:
                        with world.together(f"share the update of {name}"):
                            dist.broadcast(found, group=group, group_src=owner)
                    yield name, model.part(name, found)

        return each

    return spread
