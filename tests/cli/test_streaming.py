"""The streaming backend from the command line: a run goes on from its store, plan, show, and the programs around it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from known_peak import PROGRAM

from weftrain.analysis.compare.same_state import compare
from weftrain.analysis.machine.disk import DiskError, measured_disk
from weftrain.core.formats import fsops
from weftrain.core.run.metrics import read_metrics

FP32 = ["precision.compute=float32", "schedule.steps=4", "checkpoint.every_steps=0", "log.every_steps=1"]
DIRECT = ["--backend", "streaming", "backend.options.tier=direct", "backend.options.tile_elements=4096"]


@pytest.fixture
def tiny(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, *FP32, "model.num_layers=4"]


def test_same_state_as_the_local_backend(weftrain: Callable[..., Result], tiny: list[str], tmp_path: Path) -> None:
    runs = ["--runs", str(tmp_path)]
    for name, more in (("local", ["--backend", "local"]), ("streamed", DIRECT), ("other", [*DIRECT, "seed=9"])):
        result = weftrain("train", "crystal_demo", *runs, "--run", name, *tiny, *more)
        assert result.exit_code == 0, result.output
    line, same = compare(tmp_path / "local", tmp_path / "streamed")
    assert same, line
    assert "4 of 4 losses" in line
    line, same = compare(tmp_path / "local", tmp_path / "other")
    assert not same
    assert "first to differ: exp_avg/" in line


@pytest.mark.prove
def test_a_killed_run_goes_on_from_its_store(weftrain: Callable[..., Result], tiny: list[str], tmp_path: Path) -> None:
    """No checkpoint was made when it was killed: the store alone knows."""
    long = [*tiny, "schedule.steps=100000"]
    command = [
        *PROGRAM,
        "train",
        "crystal_demo",
        "--runs",
        str(tmp_path),
        "--run",
        "killed",
        *long,
        *DIRECT,
    ]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count('"kind": "step"') > 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = max(record["step"] for record in read_metrics(tmp_path / "killed") if record["kind"] == "step")
    last = f"schedule.steps={done + 5}"
    again = weftrain(
        "train",
        "crystal_demo",
        "--runs",
        str(tmp_path),
        "--run",
        "killed",
        *tiny,
        last,
        *DIRECT,
        "--allow",
        "schedule.steps",
    )
    assert again.exit_code == 0, again.output
    assert "completed steps: the run goes on from there" in again.output
    whole = weftrain(
        "train", "crystal_demo", "--runs", str(tmp_path), "--run", "whole", *tiny, last, "--backend", "local"
    )
    assert whole.exit_code == 0, whole.output
    line, same = compare(tmp_path / "killed", tmp_path / "whole")
    assert same, line


def test_no_checkpoint_at_the_end_where_it_is_declined(
    weftrain: Callable[..., Result], tiny: list[str], tmp_path: Path
) -> None:
    result = weftrain(
        "train", "crystal_demo", "--runs", str(tmp_path), "--run", "a", *tiny, "checkpoint.at_end=false", *DIRECT
    )
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "a" / "checkpoints").iterdir())
    again = weftrain(
        "train", "crystal_demo", "--runs", str(tmp_path), "--run", "a", *tiny, "checkpoint.at_end=false", *DIRECT
    )
    assert "is complete: 4 of 4 steps" in again.output


def test_metrics_and_timeline(weftrain: Callable[..., Result], tiny: list[str], tmp_path: Path) -> None:
    result = weftrain(
        "train", "crystal_demo", "--runs", str(tmp_path), "--run", "a", *tiny, *DIRECT, "backend.options.trace_steps=2"
    )
    assert result.exit_code == 0, result.output
    steps = [record for record in read_metrics(tmp_path / "a") if record["kind"] == "step"]
    for name in ("store_in_bytes", "store_out_bytes", "store_io_ms", "stall_ms", "compute_ms", "overlap_share"):
        assert all(name in step for step in steps)
    assert 0 <= steps[2]["overlap_share"] <= 1
    shown = weftrain("timeline", str(tmp_path / "a"))
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "a" / "timeline.png").stat().st_size > 10_000


def test_plan(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    result = weftrain(
        "plan", "bench_70m", "--backend", "streaming", "backend.options.tier=direct", "--disk", str(tmp_path)
    )
    assert result.exit_code == 0, result.output
    for words in ("step, predicted", "limited by", "memory, computed", "disk, computed", "1.41 GB"):
        assert words in result.output
    assert not list(tmp_path.iterdir())
    other = weftrain("plan", "bench_70m", "--backend", "null", "--disk", str(tmp_path))
    assert other.exit_code != 0
    assert "predicts nothing" in other.output


def test_show_with_a_backend(weftrain: Callable[..., Result]) -> None:
    """The recipe's options are its own backend's (activation_checkpointing): another backend is asked without them."""
    result = weftrain(
        "show",
        "amber_7b",
        "--backend",
        "streaming",
        "backend.options.tier=direct",
        "backend.options.state_format=bf16_moments",
    )
    assert result.exit_code == 0, result.output
    assert "GB of state" in result.output
    assert "################################" in result.output


def test_a_disk_without_room_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = measured_disk(tmp_path, 1 << 27)
    assert min(speed.read, speed.write, speed.mixed) > 0

    def full(name: str, path: Path, action: Callable[[], object]) -> object:
        if name == "allocate":
            raise OSError(28, "No space left on device", str(path))
        return action()

    monkeypatch.setattr(fsops, "_perform", full)
    with pytest.raises(DiskError, match="No space left on device"):
        measured_disk(tmp_path, 1 << 27)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_memory_cap_says_what_it_did() -> None:
    def run(mib: str, code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "weftrain.analysis.machine.memory_cap", mib, "--", sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("2000", "x = bytearray(50 << 20); raise SystemExit(3)")
    assert done.returncode == 3
    capped = "capped at 1.95 GiB by a cgroup" in done.stdout
    assert capped or "memory NOT capped" in done.stdout
    assert run("100", "").returncode == 0
    if not capped:
        pytest.skip("no right to make a cgroup here")
    greedy = run("64", "x = bytearray(200 << 20)")
    assert greedy.returncode == 128 + signal.SIGKILL
    assert "needed more than the cap" in greedy.stderr


def test_memory_cap_passes_a_signal_on() -> None:
    command = [sys.executable, "-m", "weftrain.analysis.machine.memory_cap", "2000", "--", sys.executable, "-c"]
    command += ["import time; print('up', flush=True); time.sleep(120)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
