"""What a run is doing, told from the ends of its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weftrain.analysis.watch.view import RunView, runs_in
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.run_folder import LOCK, RECIPE, held_run

BEGAN = 1_000_000.0


class Made:
    """A run's folder as training would leave it, and a clock."""

    def __init__(self, folder: Path, steps: int = 100) -> None:
        self.folder, self.now = folder, BEGAN
        folder.mkdir(parents=True)
        (folder / RECIPE).write_text(json.dumps({"schedule": {"steps": steps}}))
        (folder / LOCK).write_text("")

    def line(self, kind: str, step: int, **more: Any) -> None:
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"kind": kind, "time": self.now, "step": step, **more}) + "\n")

    def steps(self, first: int, stop: int, seconds: float = 2.0) -> None:
        for step in range(first, stop):
            self.now += seconds
            self.line("step", step, loss=3.0 - step / 100, tokens_per_second=1000.0, skipped=False)

    def view(self, stall_s: float | None = None) -> RunView:
        return RunView(self.folder, stall_s, lambda: self.now)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "a_run")


@pytest.fixture
def running(made: Made) -> Iterator[Made]:
    with held_run(made.folder):
        yield made


def test_a_run_is_followed_from_its_start_to_its_end(running: Made) -> None:
    view = running.view()
    assert view.update().state == "running"
    assert view.update().step == 0
    running.steps(1, 21)
    running.line("evaluation", 20, set="words", loss=2.5)
    running.line("score", 20, set="arc", metric="acc", value=0.25)
    running.line("alert", 20, rule="r", action="log", words="r: bad", value=1.0)
    (running.folder / "checkpoints" / "step_00000020").mkdir(parents=True)
    found = view.update()
    assert (found.state, found.step, found.steps, found.loss) == ("running", 20, 100, 2.8)
    assert (found.tokens_per_second, found.eta_s, found.age_s) == (1000.0, 160.0, 0.0)
    assert (found.checkpoint_step, found.evaluations, found.alerts) == (20, {"words": (20, 2.5)}, ((20, "r: bad"),))
    assert found.scores == {"arc acc": (20, 0.25)}
    assert len(found.losses) == len(found.speeds) == 20
    running.now += 59
    assert view.update().state == "running"
    running.now += 2
    assert view.update().state == "stalled"
    running.steps(21, 101)
    running.line("end", 100)
    assert view.update().eta_s == 0


def test_the_end_and_a_stop_are_known(made: Made) -> None:
    made.steps(1, 51)
    assert made.view().update().state == "stopped"
    made.line("end", 50)  # at a loss that was asked for, say
    assert made.view().update().state == "complete"
    made.line("resume", 40)
    found = made.view().update()
    assert (found.state, found.step, found.loss) == ("stopped", 40, 2.6)


def test_lines_without_a_lock_come_from_another_machine(made: Made) -> None:
    (made.folder / LOCK).write_text(json.dumps({"host": "elsewhere.invalid"}) + "\n")
    made.steps(1, 51)
    view = made.view()
    assert view.update().state == "writing"
    made.now += 100
    assert view.update().state == "stopped"


def test_a_stall_is_told_by_the_usual_time_between_lines_or_by_what_is_asked(running: Made) -> None:
    running.steps(1, 11, seconds=30)
    running.now += 290
    assert running.view().update().state == "running"
    assert running.view(stall_s=60).update().state == "stalled"
    running.now += 20
    assert running.view().update().state == "stalled"


def test_what_is_no_run_or_damaged_is_told(tmp_path: Path, made: Made) -> None:
    found = RunView(tmp_path).update()
    assert (found.state, found.problem) == ("unreadable", f"{tmp_path}: is no run's folder")
    (made.folder / RECIPE).write_text("[]")
    assert "is not a recipe" in (made.view().update().problem or "")
    (made.folder / RECIPE).unlink()
    (made.folder / METRICS).write_bytes(b'\xff\n{"kind": "step"}\n[1]\n{"kind": "step", "step": 3, "loss": "nan"}\nto')
    found = made.view().update()
    assert (found.step, found.steps, found.state) == (3, None, "stopped")
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["loss"] is None


def test_only_the_end_of_a_long_file_is_read(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weftrain.analysis.watch.view._FIRST_BYTES", 20_000)
    monkeypatch.setattr("weftrain.analysis.watch.view._FIRST_LINES", 5)
    made.line("evaluation", 1, set="old", loss=2.0)
    made.steps(2, 300)
    made.line("evaluation", 299, set="words", loss=1.0)
    made.steps(300, 320)
    found = made.view().update()
    assert (found.step, len(found.losses), found.evaluations) == (319, 5, {"words": (299, 1.0)})


def test_a_folder_of_runs_stands_for_them(made: Made, tmp_path: Path) -> None:
    Made(tmp_path / "b_run")
    (tmp_path / "other").mkdir()
    assert [path.name for path in runs_in(tmp_path)] == ["a_run", "b_run"]
    assert runs_in(made.folder) == [made.folder]
