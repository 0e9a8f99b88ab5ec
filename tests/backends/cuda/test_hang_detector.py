"""A signal to stop that reaches any one rank is known to rank 0, which alone decides when the run stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from weftrain.backends.cuda import hang_detector as module
from weftrain.backends.cuda.hang_detector import HangDetector
from weftrain.backends.cuda.world import World
from weftrain.core.stop import StopRequest


class OneStore(World):
    """A rank of a world whose store lies in this process."""

    def own_store(self) -> dist.Store:
        return self.store


def test_a_signal_at_any_rank_reaches_rank_0() -> None:
    store = dist.HashStore()
    worlds = [OneStore(torch.device("cpu"), store, rank, 3, 1.0, StopRequest()) for rank in range(3)]
    detectors = [HangDetector(world) for world in worlds]
    for detector in detectors:
        detector.close()
    for detector in detectors:
        detector.pass_on_stop()
    assert not any(world.stop.requested() for world in worlds)
    worlds[2].stop.ask(signal.SIGTERM)
    for detector in (detectors[2], detectors[1], detectors[0]):
        detector.pass_on_stop()
    # Rank 1 goes on: it stops when rank 0 commands no more steps, so that all stop after the same one.
    assert [world.stop.number for world in worlds] == [signal.SIGTERM, 0, signal.SIGTERM]


def test_a_request_to_save_at_any_rank_reaches_rank_0_once() -> None:
    store = dist.HashStore()
    worlds = [OneStore(torch.device("cpu"), store, rank, 3, 1.0, StopRequest()) for rank in range(3)]
    detectors = [HangDetector(world) for world in worlds]
    for detector in detectors:
        detector.close()
    for asked in (1, 2):
        worlds[2].stop.ask_save()
        for _ in range(2):
            for detector in reversed(detectors):
                detector.pass_on_stop()
        assert worlds[0].stop.saves == asked
        assert (worlds[0].stop.take_save(), worlds[0].stop.take_save()) == (True, False)
    assert not any(world.stop.requested() for world in worlds)


def told_to_end(world: OneStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which a rank's process ends when it looks at what rank 0 says."""
    ended: list[int] = []
    detector = HangDetector(world)
    detector.close()
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(module, "_END_S", 0.0)
    detector.end_if_told()
    return ended


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_stopped_process_is_killed_by_a_rank_on_its_node(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = dist.HashStore()
    world = OneStore(torch.device("cpu"), store, 1, 3, 1.0, StopRequest())
    world.host = "here"
    with subprocess.Popen(["sleep", "60"]) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        store.set("beat/2", json.dumps({"host": host, "process": stopped.pid}))
        store.set("end", json.dumps({"ranks": [2]}))
        assert told_to_end(world, monkeypatch) == []
        deadline = time.monotonic() + (5 if host == "here" else 0.05)
        while stopped.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stopped.poll() == (-signal.SIGKILL if host == "here" else None)
        stopped.kill()


def test_a_rank_that_is_told_to_end_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = dist.HashStore()
    store.set("end", json.dumps({"ranks": [1]}))
    world = OneStore(torch.device("cpu"), store, 1, 3, 1.0, StopRequest())
    assert told_to_end(world, monkeypatch) == [1]
    assert b"rank 1 stalls: rank 0 ends it" in store.get("failure")


def test_rank_1_names_a_leader_that_was_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And tells it to end, and itself; a leader that still beats is left alone."""
    store: Any = dist.HashStore()
    world = OneStore(torch.device("cpu"), store, 1, 2, 1.0, StopRequest())
    world.stall_s, world.replace_stalled = 0.0, True
    detector = HangDetector(world)
    detector.close()
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for name in ("_LEADER_S", "_END_S", "_BEAT_S"):
        monkeypatch.setattr(module, name, 0.0)
    beat = {"host": "other", "process": 1, "doing": "read rows", "step": 7}
    for count in range(3):
        store.set("beat/0", json.dumps({**beat, "beats": count}))
        detector._watch_leader()
    assert ended == []
    time.sleep(0.001)
    detector._watch_leader()
    assert ended == [1]
    assert json.loads(store.get("end")) == {"ranks": [0]}
    assert (
        "rank 0 does not answer any more: process 1 on other, which should read rows, step 7" in capsys.readouterr().err
    )
