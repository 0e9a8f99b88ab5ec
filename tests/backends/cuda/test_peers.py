"""A rank that has ended is noticed by the ranks of its node, and a silent one by the rank before it."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
import torch
import torch.distributed as dist

from weftrain.backends.cuda import peers as module
from weftrain.backends.cuda.hang_detector import HangDetector
from weftrain.backends.cuda.peers import Peers, runs
from weftrain.backends.cuda.world import World
from weftrain.core.stop import StopRequest


class OneStore(World):
    def own_store(self) -> dist.Store:
        return self.store


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def beat(store: Any, rank: int, process: int, host: str = "here", **more: Any) -> None:
    store.set(f"beat/{rank}", json.dumps({"host": host, "process": process, **more}))


def world(monkeypatch: pytest.MonkeyPatch, rank: int = 1, size: int = 4) -> OneStore:
    for name, value in {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, str(value))
    found = OneStore(torch.device("cpu"), dist.HashStore(), rank, size, 60.0, StopRequest())
    found.host = "here"
    return found


def ended() -> int:
    with subprocess.Popen(["true"]) as process:
        return process.pid


def test_a_process_that_nobody_waited_for_yet_has_ended() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not runs(process.pid)
    process.wait()
    assert not runs(process.pid)
    assert runs(os.getpid())


def test_a_process_that_ended_is_named(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    own, dead = world(monkeypatch), ended()
    for rank, process in ((0, os.getpid()), (2, os.getpid()), (3, dead)):
        beat(own.store, rank, process)
    peers = Peers(own, own.store)
    assert peers.lost() is None  # it may beat yet
    clock[0] += 4
    assert peers.lost() == f"rank 3 (process {dead}) has ended"


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_one_that_beats_has_not_ended(host: str, monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    """Whatever process has its number here: it may be in another container."""
    own, dead = world(monkeypatch), ended()
    peers = Peers(own, own.store)
    for count in range(20):
        beat(own.store, 2, os.getpid(), beats=count)
        beat(own.store, 3, dead, host, beats=count if host == "here" else 0)
        assert peers.lost() is None
        clock[0] += 4


def test_the_next_rank_is_lost_when_it_is_silent(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    own = world(monkeypatch, rank=3)
    peers = Peers(own, own.store)
    clock[0] += 1000
    assert peers.lost() is None  # it has not begun
    beat(own.store, 0, os.getpid(), "elsewhere")
    assert peers.lost() is None
    clock[0] += 59
    assert peers.lost() is None
    clock[0] += 2
    assert peers.lost() == "rank 0 has not answered for 61 s"


def test_a_rank_that_waits_too_long_for_a_lost_one_ends(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    own = world(monkeypatch)
    lost: list[str | None] = [None]
    monkeypatch.setattr(module.Peers, "lost", lambda peers: lost[0])
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    detector = HangDetector(own)
    detector.close()

    def later(seconds: float) -> None:
        clock[0] += seconds
        detector.watch_peers()

    with own.together("add"):
        later(0)
        later(100)  # all are there: it may take long to compute
        assert own.reported_failure() is None
        lost[0] = "rank 2 has ended"
        own.waits += 1
        later(0)
        later(4)
        assert "rank 1, which should add: rank 2 has ended" in capsys.readouterr().err
        assert own.reported_failure() == "rank 1 on here: rank 2 has ended"
        later(60)
        assert codes == []  # until then the collective may end by itself
        later(2)
        assert codes == [1]
        assert "rank 1 waited 66 s to add: rank 1 on here: rank 2 has ended" in capsys.readouterr().err
    later(1000)
    assert codes == [1]


def test_the_first_reason_stays() -> None:
    own = OneStore(torch.device("cpu"), dist.HashStore(), 1, 2, 1.0, StopRequest())
    own.host = "here"
    own.report_failure("the disk is full")
    own.report_failure("another rank failed")
    assert own.reported_failure() == "rank 1 on here: the disk is full"
