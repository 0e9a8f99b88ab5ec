"""`weftrain runs`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from weftrain.core.run.run_folder import held_run


@pytest.fixture
def listed(weftrain: Callable[..., Result], tmp_path: Path) -> Callable[[], list[dict[str, object]]]:
    def call() -> list[dict[str, object]]:
        result = weftrain("runs", tmp_path / "runs", "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert isinstance(found, list)
        return found

    return call


def test_states(
    weftrain: Callable[..., Result],
    train_tiny: Callable[..., Result],
    listed: Callable[[], list[dict[str, object]]],
    tmp_path: Path,
) -> None:
    assert train_tiny("schedule.steps=3").exit_code == 0
    folder = tmp_path / "runs" / "crystal_demo"
    (run,) = listed()
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert run["name"] == "crystal_demo"
    assert run["state"] == "complete"
    assert run["step"] == run["steps"] == 3
    assert isinstance(run["loss"], float)
    assert last["kind"] in ("step", "evaluation", "checkpoint")
    with held_run(folder):
        assert listed()[0]["state"] == "running"
    ledger = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(ledger[:-1]))
    metrics = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    steps = [line for line in metrics if b'"step"' in line.partition(b'"kind":')[2][:8]]
    (folder / "metrics.jsonl").write_bytes(steps[0] + b"torn")
    run = listed()[0]
    assert (run["state"], run["step"]) == ("stopped", json.loads(steps[0])["step"])
    (folder / "metrics.jsonl").unlink()
    assert listed()[0]["state"] == "started"
    assert "started" in weftrain("runs", tmp_path / "runs").output
    (folder / "recipe.json").write_text("[]")
    run = listed()[0]
    assert run["state"] == "unreadable"
    assert "is not a recipe" in str(run["problem"])


def test_nothing_there(weftrain: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no runs in runs: `weftrain train crystal_demo` makes one" in weftrain("runs").output
    assert json.loads(weftrain("runs", "--json").stdout) == []
    result = weftrain("runs", "nowhere")
    assert result.exit_code == 2
    assert "'nowhere' is not a folder" in result.output
