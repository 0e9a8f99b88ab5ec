"""`weftrain track`, and trackers beside the training: a run ends as without them, whatever they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from record_runs import done, weftrain

from weftrain.analysis.tracking import observer
from weftrain.core.run.metrics import read_metrics

Train = Callable[..., Result]

MODULE = """
import json, pathlib, time
class Written:
    def problem(self): return ""
    def open(self, run, known, after):
        self.path = run.folder / "written.jsonl"
        return known or "first"
    def send(self, records):
        with self.path.open("a") as file:
            for one in records:
                file.write(json.dumps([one.kind, one.step, one.event]) + "\\n")
    def rewind(self, step): return False
    def close(self, ending): self.send([type("End", (), {"kind": ending, "step": 0, "event": ""})])
class Hanging(Written):
    def open(self, run, known, after): time.sleep(600)
class NoKey(Written):
    def problem(self): return "no key: set SOME_KEY"
"""
SMALL = ("schedule.steps=4", "checkpoint.every_steps=2")


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    (folder / "more_trackers-1.dist-info").mkdir(parents=True)
    (folder / "more_trackers.py").write_text(MODULE)
    info = folder / "more_trackers-1.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-trackers\nVersion: 1\n")
    names = "".join(f"{name.lower()} = more_trackers:{name}\n" for name in ("Written", "Hanging", "NoKey"))
    (info / "entry_points.txt").write_text(f"[weftrain.trackers]\n{names}")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.usefixtures("others")
def test_a_run_goes_on_whatever_its_trackers_do(
    train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "crystal_demo"
    monkeypatch.setattr(observer, "CLOSE_S", 20.0)
    result = done(train_tiny(*SMALL, "log.trackers=[written, nokey]"))
    told = f"warning: tracker nokey: no key: set SOME_KEY; `weftrain track {run} --to nokey` sends what is missing"
    assert result.index(told) < result.index("kernels ")
    lines = [json.loads(line) for line in (run / "written.jsonl").read_text().splitlines()]
    steps = [step for kind, step, _ in lines if kind == "step"]
    assert steps == [line["step"] for line in read_metrics(run) if line["kind"] == "step"] == [1, 2, 3, 4]
    assert [event for *_, event in lines if event][-1] == "ended after step 4"
    assert lines[-1][0] == "finished"

    monkeypatch.setattr(observer, "CLOSE_S", 0.2)
    result = done(train_tiny(*SMALL, "--run", "hangs", "log.trackers=[hanging]"))
    assert "warning: tracker hanging: it did not take everything before the end; `weftrain track " in result
    assert [line["step"] for line in read_metrics(tmp_path / "runs" / "hangs") if line["kind"] == "step"] == [
        1,
        2,
        3,
        4,
    ]


def test_an_unknown_tracker_is_refused_before_the_first_step(train_tiny: Train, tmp_path: Path) -> None:
    result = train_tiny(*SMALL, "log.trackers=[wandbb]")
    assert result.exit_code != 0
    assert "there is no tracker 'wandbb': there are tensorboard, wandb, mlflow" in result.output
    assert not (tmp_path / "runs" / "crystal_demo").exists()


def test_a_finished_run_is_sent_once(train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(train_tiny(*SMALL))
    run = tmp_path / "runs" / "crystal_demo"
    first = done(weftrain("track", run, "--to", "tensorboard"))
    assert "records sent; the tracked run is tensorboard" in first
    assert done(weftrain("track", run, "--to", "tensorboard")).startswith("tensorboard: 0 records sent")
    assert list((run / "tensorboard").iterdir())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = weftrain("track", run, "--to", "mlflow")
    assert result.exit_code == 2
    assert "tracker mlflow: MLFLOW_TRACKING_URI is not set" in result.output
    assert "is missing: name the folder of a run" in weftrain("track", tmp_path, "--to", "tensorboard").output
