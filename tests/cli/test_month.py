"""Verbs on a run as a month leaves it: 400 checkpoints, a hundred thousand ledger lines, a million metrics lines."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from month_runs import FULL, SMALL, Month, grow

from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run import ledger, metrics_lines
from weftrain.core.run.run_folder import stored_recipe
from weftrain.core.stop import StopRequest

RATE = "schedule.learning_rate=[{shape: constant, steps: 2000000, start: 0.001}]"


def grown(train_tiny: Callable[..., Result], runs: Path, month: Month) -> Path:
    keys = [month.keep, f"checkpoint.every_steps={month.steps // month.saves}", f"schedule.steps={month.steps + 3}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "requested", lambda stop: True)  # after its first step
        found = train_tiny(RATE, *keys, "log.every_steps=1", "optimizer.non_finite=skip")
    assert found.exit_code == 0, found.output
    (run,) = runs.iterdir()
    grow(run, recorded_recipe(stored_recipe(run), "recipe").recipe, month)
    return run


@pytest.mark.prove
def test_a_long_run_goes_on_and_each_line_was_read_once(
    train_tiny: Callable[..., Result],
    weftrain: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = grown(train_tiny, tmp_path / "runs", SMALL)
    lines = len((run / "ledger.jsonl").read_bytes().splitlines())
    checked: list[int] = []
    read = ledger.read_line
    monkeypatch.setattr(ledger, "read_line", lambda line: (entry := read(line), checked.append(entry["n"]))[0])
    parsed: list[bytes] = []
    parse = metrics_lines.checked_line
    monkeypatch.setattr(metrics_lines, "checked_line", lambda data: (parsed.append(data), parse(data))[1])
    for verb in ("log", "report"):
        assert weftrain(verb, run).exit_code == 0
    assert len(checked) == lines
    assert len(parsed) < 400  # of 2,300: the others are step lines alike but for their numbers
    found = weftrain("train", "crystal_demo", "--runs", tmp_path / "runs")
    assert found.exit_code == 0, found.output
    assert "2,003 steps" in found.output
    assert sorted(checked[:lines]) == list(range(lines))
    assert len(checked) < lines + 20  # what the start itself entered


@pytest.mark.soak
def test_a_month_is_read_in_seconds(train_tiny: Callable[..., Result], tmp_path: Path) -> None:
    run, peak = grown(train_tiny, tmp_path / "runs", FULL), 0
    verbs = ("log RUN", "report RUN", "prune RUN --dry-run", "watch RUN --once", f"runs {run.parent}")
    resume = f"train crystal_demo --runs {run.parent}"  # three steps, and all that a start looks at
    for words in (*verbs, resume, resume):
        began = time.monotonic()
        command = [sys.executable, "-m", "weftrain.cli", *words.replace("RUN", str(run)).split()]
        _, status, used = os.wait4(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid, 0)
        assert status == 0, command
        peak = max(peak, used.ru_maxrss * 1024)
        cpu_s = used.ru_utime + used.ru_stime
        print(f"{words}: {time.monotonic() - began:.1f} s, {cpu_s:.1f} CPU s")
    print(f"memory: {peak / 1e6:.0f} MB at most")
    assert peak < 1e9
