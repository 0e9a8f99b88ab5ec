"""`weftrain train` with alerts: they are told and recorded, and what they ask for is done, in one command or the next."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from record_runs import done, prepare, trainer, weftrain

from weftrain.core import checkpoint
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS, read_metrics

Train = Callable[..., Result]
TOKENS_OF_A_STEP = 52


def alerts(*rules: str) -> str:
    return f"alerts=[{', '.join(rules)}]"


def beyond(step: int, *more: str) -> str:
    """A rule that alerts in the line of `step`, and is calm again in none."""
    words = ", ".join(("rule: metric", "metric: tokens", f"above: {(step - 1) * TOKENS_OF_A_STEP}", *more))
    return f"{{{words}}}"


def alert_lines(run: Path) -> list[tuple[Any, ...]]:
    return [(one["step"], one["rule"], one["action"]) for one in read_metrics(run) if one["kind"] == "alert"]


def ledger_lines(run: Path, *kinds: str) -> list[tuple[Any, ...]]:
    return [(one["kind"], one["step"]) for one in read_ledger(run / LEDGER) if one["kind"] in kinds]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(datasets: Path, tmp_path: Path) -> Train:
    (tmp_path / "datasets").symlink_to(datasets)
    return trainer(tmp_path)


def test_an_alert_is_a_line_of_metrics_and_of_the_console(train_tiny: Train, tmp_path: Path) -> None:
    rules = alerts(beyond(3), "{rule: metric, name: typo, metric: los, above: 1}")
    told = done(train_tiny("--backend", "null", "schedule.steps=5", rules))
    assert "step      3  alert metric: tokens 156 is above 104" in told
    assert "warning: alert rule 'typo': no line has a number 'los' so far; there are: " in told
    run = tmp_path / "runs" / "crystal_demo"
    assert alert_lines(run) == [(3, "metric", "log")]
    assert ledger_lines(run, "alert") == []
    lines = done(weftrain("log", run)).splitlines()
    (place,) = [number for number, line in enumerate(lines) if "step      3  alert metric: tokens 156" in line]
    assert "step      5  checkpoint" in lines[place + 1]


def test_a_checkpoint_is_made_and_a_halt_is_saved_and_told_by_the_exit_code(train_tiny: Train, tmp_path: Path) -> None:
    rules = alerts(beyond(2, "name: early", "actions: [checkpoint]"), beyond(4, "actions: [halt]"))
    args = ("--backend", "null", "schedule.steps=6", rules)
    halted = train_tiny(*args)
    assert halted.exit_code == 6, halted.output
    assert "alert at step 4: metric: tokens 208 is above 156; the run is saved and halts" in halted.output
    run = tmp_path / "runs" / "crystal_demo"
    assert ledger_lines(run, "alert", "checkpoint", "end") == [
        ("alert", 2),
        ("checkpoint", 2),
        ("alert", 4),
        ("checkpoint", 4),
    ]
    assert "halt" in done(weftrain("log", run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        restarted = train_tiny(*args)
    assert restarted.exit_code == 6
    assert "no launcher's restart goes on from that" in restarted.output
    done(train_tiny(*args))  # the stretch is known: it goes on
    assert alert_lines(run) == [(2, "early", "checkpoint"), (4, "metric", "halt")]
    assert ledger_lines(run, "end") == [("end", 6)]


def test_a_rollback_defers_the_chunk_in_the_same_command_and_not_for_ever(train: Train, tmp_path: Path) -> None:
    rules = alerts(beyond(3, "actions: [rollback]", "rollbacks: 1"))
    halted = train(rules)
    assert halted.exit_code == 6, halted.output
    assert "the run goes back to step 2, and chunk 1 is deferred" in halted.output
    assert "chunk 1 is deferred, as the ledger says: alert metric at step 3: tokens 156 is above 104" in halted.output
    assert "it went back 1 times before" in halted.output
    run = tmp_path / "runs" / "crystal_demo"
    kinds = ("alert", "rollback", "defer", "resume", "checkpoint")
    assert ledger_lines(run, *kinds) == [
        ("checkpoint", 2),
        ("alert", 3),
        ("rollback", 2),
        ("defer", 2),
        ("resume", 2),
        ("alert", 3),
        ("checkpoint", 3),
    ]
    done(train(rules))
    weftrain("report", run)
    by_hand = ("--run", "by_hand", "data.skip=[{chunk: 1, action: defer, reason: x}]")
    done(train(*by_hand))
    states = [
        checkpoint.newest(tmp_path / "runs" / name / "checkpoints", print) for name in ("crystal_demo", "by_hand")
    ]
    tensors = [checkpoint.load(state)[0].tensors for state in states if state is not None]
    assert all((tensors[0][name] == tensors[1][name]).all() for name in tensors[0])
    effective = [one for one in read_metrics(run) if one["kind"] == "step"]
    assert [one["step"] for one in effective] == [1, 2, 3, 4, 5, 6]


def test_a_run_without_chunks_goes_back_once_for_the_same_rows(train_tiny: Train, tmp_path: Path) -> None:
    rules = alerts(beyond(3, "actions: [rollback]"))
    args = ("--backend", "null", "schedule.steps=6", "checkpoint.every_steps=2", rules)
    halted = train_tiny(*args)
    assert halted.exit_code == 6, halted.output
    assert "the run goes back to step 2\n" in halted.output
    assert "and the same rows made it again" in halted.output
    run = tmp_path / "runs" / "crystal_demo"
    assert alert_lines(run) == [(3, "metric", "rollback"), (3, "metric", "halt")]
    first = train_tiny(*args[:-1], alerts(beyond(1, "actions: [rollback]")), "--run", "first")
    assert "there is no checkpoint of step 0 or before to go back to" in first.output
    assert first.exit_code == 6


def test_a_stretch_that_is_trained_again_after_a_crash_is_told_once(train_tiny: Train, tmp_path: Path) -> None:
    args = ("--backend", "null", "schedule.steps=6", "checkpoint.every_steps=2", alerts(beyond(5)))
    run = tmp_path / "runs" / "crystal_demo"
    done(train_tiny(*args))
    lines = (run / METRICS).read_text().splitlines()
    cut = next(place for place, line in enumerate(lines) if json.loads(line)["kind"] == "alert")
    kept = [line for line in lines[: cut + 1] if json.loads(line)["kind"] != "checkpoint"]
    (run / METRICS).write_text("\n".join(kept) + "\n")
    crashed = [line for line in (run / LEDGER).read_text().splitlines() if json.loads(line)["step"] < 6]
    (run / LEDGER).write_text("\n".join(crashed) + "\n")
    for path in (run / "checkpoints").glob("*0006"):
        path.rename(tmp_path / path.name)
    done(train_tiny(*args))
    assert alert_lines(run) == [(5, "metric", "log")]
