"""The meshes of a run's ranks. Every group of a mesh waits as long as the world does, and no longer.

`init_device_mesh` takes no timeout: its groups wait for torch's default of half an hour, both in their collectives and
while they are made, which is at the store and so notices no rank that has ended.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def mesh_of(device_type: str, shape: tuple[int, ...], names: tuple[str, ...], timeout_s: float) -> DeviceMesh:
    """All ranks in row-major order of `shape`, a dimension a name. A collective.

    timeout_s: of every group; a dimension that spans all ranks is the world's own group.
    """
    ranks = torch.arange(dist.get_world_size()).view(shape)
    groups: list[dist.ProcessGroup] = []
    for dim, size in enumerate(shape):
        if size == ranks.numel():
            world = dist.group.WORLD
            assert world is not None
            groups.append(world)
            continue
        own = None
        for members in ranks.movedim(dim, -1).reshape(-1, size).tolist():  # every rank makes every group, in one order
            group = dist.new_group(members, timeout=datetime.timedelta(seconds=timeout_s))
            own = group if dist.get_rank() in members else own
        assert own is not None, "each rank is in one of the groups along a dimension"
        groups.append(own)
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=names)
