"""A tracker beside the training: one that fails is told once and tried again, one that hangs is let go."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kept_tracker import Kept
from small_metrics import train

from weftrain.analysis.tracking import observer
from weftrain.analysis.tracking.follower import Follower
from weftrain.analysis.tracking.observer import TrackingProcess, TrackingThread
from weftrain.core.run.metrics import MetricsWriter


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "POLL_S", 0.01)
    monkeypatch.setattr(observer, "RETRIES_S", (0.01, 0.02))


def until(condition: object, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_tracker_that_fails_is_told_once_and_gets_everything_later(tmp_path: Path) -> None:
    tracker = Kept()
    tracker.fails = 3
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 3)
        thread = TrackingThread("kept", lambda: Follower(tmp_path, "kept", tracker), "`track` sends it")
        until(lambda: tracker.losses() if tracker.runs else None)
        train(writer, 4, 9)
        thread.recorded(False)
        thread.close(20.0)
    assert thread.problems() == ("tracker kept: ConnectionError: no route to host; `track` sends it",)
    assert thread.problems() == ()
    assert tracker.losses() == [(step, 10 / step) for step in range(1, 10)]
    assert tracker.endings == [("run1", "interrupted")]


def test_a_thread_that_hangs_is_left_behind(tmp_path: Path) -> None:
    def hang() -> Follower:
        time.sleep(60)
        raise AssertionError

    thread = TrackingThread("kept", hang, "`track` sends it")
    thread.close(0.05)
    assert thread.problems() == ("tracker kept: it did not take everything before the end; `track` sends it",)


def test_steps_beside_trackers_that_hang_ask_nothing_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand steps start no thread, write nothing, and call nothing that waits."""
    made = []

    def hang() -> Follower:
        made.append(1)
        time.sleep(60)
        raise AssertionError

    process = TrackingProcess("one", tmp_path, "x", (sys.executable, "-c", "import time; time.sleep(60)"))
    both = (TrackingThread("other", hang, "x"), process)
    until(lambda: made)
    waits: list[str] = []
    pauses = [(time, "sleep"), (os, "write"), (subprocess.Popen, "wait"), (subprocess.Popen, "poll")]
    pauses += [(threading.Thread, "join"), (threading.Event, "wait"), (threading.Condition, "wait")]
    own, before = threading.get_ident(), threading.active_count()
    for place, name in pauses:
        whole = getattr(place, name)

        def told(*given: Any, whole: Any = whole, name: str = name, **named: Any) -> Any:
            if threading.get_ident() == own:
                waits.append(name)
            return whole(*given, **named)

        monkeypatch.setattr(place, name, told)
    for _ in range(1000):
        for one in both:
            one.recorded(False)
            assert one.problems() == ()
    monkeypatch.undo()
    assert (waits, made, threading.active_count()) == ([], [1], before)
    process.close(0.05)


def test_a_process_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    told = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    process = TrackingProcess("kept", tmp_path, "x", (sys.executable, "-c", told))
    found: list[str] = []
    until(lambda: found.extend(process.problems()) or found)
    began = time.monotonic()
    process.close(0.05)
    assert time.monotonic() - began < 5
    assert process.problems() == ("tracker kept: it did not take everything before the end; x",)
    child = Path("/proc") / found[0].split()[2].rstrip(";")
    until(lambda: not child.exists() or "\nState:\tZ" in (child / "status").read_text())


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    process = TrackingProcess("kept", tmp_path, "x", (sys.executable, "-c", "print('a\x1b[2J'); raise SystemExit(3)"))
    process.close(20.0)
    assert process.problems() == ("tracker kept: a\\x1b[2J; x", "tracker kept: its process ended with code 3; x")
