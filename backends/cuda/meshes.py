"""The meshes of a run's ranks. Every group of a mesh waits as long as the world does, and no longer.

`init_device_mesh` takes no timeout: its groups wait for torch's default of half an hour, both in their collectives and
while they are made, which is at the store and so notices no rank that has ended.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def mesh_of(
    device_type: str, shape: tuple[int, ...], names: tuple[str, ...], timeout_s: float, stages: int = 1
) -> DeviceMesh:
    """The ranks of this one's pipeline stage in row-major order of `shape`, a dimension a name. A collective of all.

    timeout_s: of every group; a dimension that spans all ranks is the world's own group. stages: groups of equally many
    ranks, one after another.
    """
    ranks = torch.arange(dist.get_world_size()).view(stages, *shape)
    groups = [own_group(ranks.movedim(dim, -1).reshape(-1, size), timeout_s) for dim, size in enumerate(shape, 1)]
    own = ranks[dist.get_rank() // ranks[0].numel()]
    return DeviceMesh.from_group(groups, device_type, mesh=own, mesh_dim_names=names)


def own_group(ranks: torch.Tensor, timeout_s: float) -> dist.ProcessGroup:
    """The group of this rank's row of `ranks`, [groups, ranks of one], in which each rank is once. A collective."""
    if len(ranks) == 1:
        world = dist.group.WORLD
        assert world is not None
        return world
    own = group_among(ranks, timeout_s)
    assert own is not None, "each rank is in one of the groups"
    return own


def group_among(ranks: torch.Tensor, timeout_s: float) -> dist.ProcessGroup | None:
    """As own_group, of ranks of which some are in no group: these are given None. A collective of all."""
    own = None
    for members in ranks.tolist():  # every rank makes every group, in one order
        group = dist.new_group(members, timeout=datetime.timedelta(seconds=timeout_s))
        own = group if dist.get_rank() in members else own
    return own
