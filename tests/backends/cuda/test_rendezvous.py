"""A world that cannot be completed is taken down again, so that another can be made."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from weftrain.backends.cuda import rendezvous as module
from weftrain.core.errors import BackendError


def test_a_hang_detector_that_cannot_start_leaves_no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(world: object) -> None:
        raise RuntimeError("can't start new thread")

    left = []
    monkeypatch.setattr(module, "_joined", {})
    monkeypatch.setattr(module, "_join", lambda *arguments: (dist.HashStore(), 0, 2))
    monkeypatch.setattr(module, "HangDetector", refuse)
    monkeypatch.setattr(module, "leave", lambda: left.append(module._joined.pop("world")))
    with pytest.raises(RuntimeError, match="new thread"):
        module.rendezvous("cpu", 5.0)
    assert [detector for _, detector in left] == [None]


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the device is chosen automatically: the fifth of four would compute on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    for wanted in ("auto", "cuda"):
        with pytest.raises(BackendError, match=r"local rank 4 has no CUDA device: torch sees 4 here"):
            module._own_device(wanted)


def test_a_second_world_computes_on_meshes_of_its_own() -> None:
    """Its groups may have the names of other groups of the first: here one more group is made before its mesh."""
    module.leave()
    try:
        for before in (0, 1):
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
            for _ in range(before):
                dist.new_group([0])
            mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("shard", "tensor"))
            spread = distribute_tensor(torch.ones(4), mesh, [Shard(0), Shard(0)])
            total = spread * 2 + spread
            assert total.device_mesh is mesh
            assert total.full_tensor().tolist() == [3.0] * 4
            module.leave()
    finally:
        module.leave()
