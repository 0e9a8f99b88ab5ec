"""Nothing that torchrun started outlives it, whatever it is doing."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from weftrain.cli import launcher

CHILD = (
    "import time; from weftrain.cli.launcher import end_with_launcher; end_with_launcher(); print('watches', "
    "flush=True); time.sleep(120)"
)
LAUNCHER = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {CHILD!r}]); time.sleep(120)"


@pytest.mark.parametrize("elastic", [True, False])
def test_a_process_ends_with_its_launcher(elastic: bool) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    variables |= {"TORCHELASTIC_RUN_ID": "test"} if elastic else {}
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, env=variables) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"watches\n"
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
        _, alive = psutil.wait_procs([child], timeout=30 if elastic else 0)
        assert bool(alive) != elastic  # ranks that were started by hand may outlive a shell
        for process in alive:
            process.kill()


def test_a_launcher_that_ended_before_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has another parent when it first looks: process 1, which is no launcher."""
    left: list[str] = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(launcher, "_leave", left.append)
    monkeypatch.setattr(launcher.threading.Thread, "start", lambda thread: None)
    for python in (False, True):
        monkeypatch.setattr(launcher, "_runs_python", lambda process, python=python: python)
        launcher.end_with_launcher()
    assert left == ["which started this process"]


def test_which_process_runs_python() -> None:
    assert launcher._runs_python(os.getpid())
    assert not launcher._runs_python(2**22 + 1)  # more than there can be
