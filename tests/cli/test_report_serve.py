"""`weftrain report --serve` as a process: it serves a run's page, follows the run, and ends cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result


@pytest.mark.prove
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_end(number: int, train_tiny: Callable[..., Result], tmp_path: Path) -> None:
    assert train_tiny("--backend", "null", "schedule.steps=3").exit_code == 0
    run = tmp_path / "runs" / "crystal_demo"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    command = [sys.executable, "-m", "weftrain.cli", "report", str(run), "--serve", "0", "--refresh", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.endswith(f"shows {run}, again every 5 s; Ctrl-C ends it\n")
    with urllib.request.urlopen(line.split()[0], timeout=20) as answer:
        assert answer.headers["Refresh"] == "5"
        assert b"crystal_demo" in answer.read()
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0 if number == signal.SIGINT else 143, "")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_cannot_be_served_is_told(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    assert "has neither ledger.jsonl nor metrics.jsonl" in weftrain("report", tmp_path, "--serve", "0").output
    assert "--serve writes no page" in weftrain("report", tmp_path, "--serve", "0", "--to", "a.html").output
