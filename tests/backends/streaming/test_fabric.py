"""Whoever waits for a run of replicas, or for its replicas, can be told to stop."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from weftrain.backends.streaming.replicas.leader import ReplicaLeader
from weftrain.backends.streaming.replicas.worker import ReplicaWorker, join_run
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.stop import StopRequest

CPU = torch.device("cpu")


def asked() -> StopRequest:
    stop = StopRequest()
    stop.ask(signal.SIGTERM)
    return stop


def test_waiting_for_replicas_ends_by_a_signal(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        ReplicaLeader(tmp_path, "agreement", 2, CPU, False, 600.0, asked())
    assert ended.value.code == 143


def test_waiting_for_a_run_ends_by_a_signal(tiny_recipe: type[Recipe], tmp_path: Path) -> None:
    job = Job(tiny_recipe(), Plan(0, 1), StrictModel(), folder=tmp_path, stop=asked())
    with pytest.raises(SystemExit) as ended:
        join_run(lambda: job, lambda job: CPU, 600.0)
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
