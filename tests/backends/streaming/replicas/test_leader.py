"""Rank 0 of a group: it waits for workers, admits them and lets them leave."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from replica_runs import asked

from weftrain.backends.streaming.replicas.leader import ReplicaLeader
from weftrain.backends.streaming.replicas.worker import ReplicaWorker
from weftrain.core.stop import StopRequest

CPU = torch.device("cpu")


def test_waiting_for_replicas_ends_by_a_signal(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        ReplicaLeader(tmp_path, "agreement", 2, CPU, False, 600.0, asked())
    assert ended.value.code == 143


@pytest.mark.parametrize("sharded", [True, False])
def test_a_replica_that_leaves_a_sharded_store_stops_the_run(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its part of the state would be missing; without shards the run goes on without it."""
    stop, orders = StopRequest(), []
    leader = ReplicaLeader(tmp_path, "agreement", 1, CPU, sharded, 600.0, stop)
    monkeypatch.setattr(leader, "command", lambda **what: orders.append(what["do"]))
    monkeypatch.setattr(leader, "_form", lambda *of: None)
    (rendezvous,) = tmp_path.glob("rendezvous-*")
    worker = ReplicaWorker(rendezvous, CPU, sharded, 600.0)
    leader._admit()
    leader.regroup()
    assert (stop.number, orders) == (0, [])
    worker.ask_to_leave(signal.SIGTERM)
    leader.regroup()
    assert (stop.number, orders) == ((signal.SIGTERM, []) if sharded else (0, ["regroup"]))
