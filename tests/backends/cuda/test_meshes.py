"""Meshes are those of torch, but for how long their groups wait."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.meshes import mesh_of
from weftrain.backends.cuda.parallel import Meshes
from weftrain.backends.cuda.rendezvous import leave
from weftrain.backends.cuda.row_share import RowShare


@pytest.fixture(params=[0, 5])
def waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The timeout that each group of a world of 8 ranks is made with, on one of its ranks."""
    leave()
    dist.init_process_group("fake", rank=request.param, world_size=8, store=FakeStore())
    made, found = dist.new_group, list[Any]()

    def new_group(*arguments: Any, **more: Any) -> Any:
        found.append(more.get("timeout"))
        return made(*arguments, **more)

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr("torch.distributed.device_mesh.new_group", new_group)
    yield found
    leave()


def test_every_group_waits_as_long_as_the_world(waits: list[Any]) -> None:
    meshes = Meshes.of(Degrees(1, 2, 2, 2), 1, "cpu", 7.0)
    RowShare(Degrees(2, 1, 2, 2), "cpu", meshes.timeout_s)
    assert len(waits) > 20
    assert set(waits) == {datetime.timedelta(seconds=7)}
    assert [mesh is None for mesh in (meshes.context, meshes.tensor, meshes.same_head)] == [False] * 3


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (2, 2, 2)])
def test_ranks_lie_in_a_mesh_as_torch_lays_them(shape: tuple[int, ...], waits: list[Any]) -> None:
    names = ("a", "b", "c")[: len(shape)]
    own, torchs = mesh_of("cpu", shape, names, 7.0), init_device_mesh("cpu", shape, mesh_dim_names=names)
    assert own.mesh.tolist() == torchs.mesh.tolist()
    for name in names:
        of_each = [dist.get_process_group_ranks(mesh[name].get_group()) for mesh in (own, torchs)]
        assert of_each[0] == of_each[1]
        assert own[name].get_local_rank() == torchs[name].get_local_rank()
