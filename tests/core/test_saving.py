"""Checkpoints that are written while the run trains on: their order, their parents, and what happens where one
fails.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from weftrain.core import checkpoint
from weftrain.core.backend import Fingerprint, Plan, State, StepResult
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, CheckpointError
from weftrain.core.formats import checkpoint_files
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.metrics import MetricsWriter, read_metrics
from weftrain.core.run.speed import Peak, Speed
from weftrain.core.trainer import TrainedStep, fit

Tiny = Callable[..., Recipe]


class Lent(dict[str, torch.Tensor]):
    """A state that copies itself when a save begins, and writes itself in two files once it is let."""

    writers = 2

    def __init__(self, value: float, gate: threading.Event, error: str | None) -> None:
        super().__init__({f"weights/{name}": torch.full((8,), value) for name in ("a", "b")})
        self._gate, self._error = gate, error

    def begin_files(
        self, folder: Path, parts: Mapping[str, checkpoint_files.Part]
    ) -> Callable[[], checkpoint_files.Written]:
        copies = {name: tensor.clone() for name, tensor in self.items()}

        def written() -> checkpoint_files.Written:
            assert self._gate.wait(20)
            if self._error:
                raise CheckpointError(self._error)
            return {name: checkpoint_files.write_file(folder / name, part, copies) for name, part in parts.items()}

        return written


class Counting:
    """A run whose only weight counts its steps."""

    def __init__(self, steps: int, error_at: int | None = None) -> None:
        self.steps, self.error_at, self.done = steps, error_at, 0
        self.gate = threading.Event()

    def train(self, source: Any) -> Iterator[StepResult]:
        for step in range(self.steps):
            self.done += 1
            yield StepResult(step, 1.0, 1.0, {}, 52, 52, 1.0, 0.0)

    def export_state(self) -> State:
        return State(
            self.done, self.done, Lent(float(self.done), self.gate, "no room" if self.done == self.error_at else None)
        )

    def fingerprint(self) -> Fingerprint:
        return Fingerprint("counting", "cpu", "none")

    def stats(self) -> dict[str, float]:
        return {}


def steps_of(
    run: Counting, recipe: Recipe, folder: Path, metrics: MetricsWriter, every_steps: int = 2, **more: Any
) -> Iterator[TrainedStep]:
    plan = Plan(0, run.steps, checkpoint_every_steps=every_steps)
    source = synthetic_source(97, 13, 12, 4, seed=5)
    places = folder / "checkpoints", metrics, Ledger(folder)
    return fit(run, plan, recipe, source, [], *places, speed=Speed(1.0, Peak(None, "")), **more)  # type: ignore[arg-type]


class Planned(Counting):
    """A run whose state can be read at the planned steps only."""

    def export_state(self) -> State:
        if self.done % 4:
            raise BackendError(f"step {self.done}: only at the planned steps")
        return super().export_state()


def test_whoever_asks_gets_a_checkpoint_and_the_run_goes_on(tiny_recipe: Tiny, tmp_path: Path) -> None:
    run, asked = Counting(6), iter([False, True, False, False, True, False])
    run.gate.set()
    with MetricsWriter(tmp_path) as metrics:
        done = list(steps_of(run, tiny_recipe(), tmp_path, metrics, 6, should_save=lambda: next(asked)))
    assert len(done) == 6
    assert sorted(checkpoint.step_folders(tmp_path / "checkpoints")) == [2, 5, 6]


def test_a_backend_that_cannot_save_there_says_so_and_goes_on(tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = Planned(8)
    run.gate.set()
    with MetricsWriter(tmp_path) as metrics:
        done = list(steps_of(run, tiny_recipe(), tmp_path, metrics, 4, should_save=lambda: run.done == 3))
    assert [one.problems for one in done if one.problems] == [
        ("no checkpoint was made: step 3: only at the planned steps",)
    ]
    assert sorted(checkpoint.step_folders(tmp_path / "checkpoints")) == [4, 8]


def test_checkpoints_by_the_clock(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """A step takes a minute: a save is due two and a half minutes after the last one began, at the end of a step."""
    run = Counting(9)
    run.gate.set()
    with MetricsWriter(tmp_path) as metrics:
        recipe = tiny_recipe("crystal", "checkpoint.every_minutes=2.5")
        list(steps_of(run, recipe, tmp_path, metrics, 5, clock=lambda: 60.0 * run.done))
    assert sorted(checkpoint.step_folders(tmp_path / "checkpoints")) == [3, 5, 8, 9]


@pytest.mark.parametrize(("left_s", "saved"), [(10.0, 5), (0.5, 4)])
def test_a_save_that_would_not_fit_in_the_time_left_is_not_begun(
    tiny_recipe: Tiny, tmp_path: Path, left_s: float, saved: int
) -> None:
    run, now = Counting(9), 0.0
    run.gate.set()

    def clock() -> float:
        nonlocal now
        now += 1.0  # some calls between the beginning of a save and its end: a few seconds
        return now

    with MetricsWriter(tmp_path) as metrics:
        stopped = list(
            steps_of(
                run,
                tiny_recipe(),
                tmp_path,
                metrics,
                should_stop=lambda: run.done == 5,
                time_to_save=lambda needed_s: needed_s <= left_s,
                clock=clock,
            )
        )
    assert len(stopped) == 5
    assert max(checkpoint.step_folders(tmp_path / "checkpoints")) == saved
    assert any("not saved: that takes" in said for said in stopped[-1].problems) == (saved == 4)


@pytest.mark.parametrize(("left_s", "saved"), [(190.0, 5), (170.0, 4)])
def test_what_is_left_of_a_save_under_way_counts_too(
    tiny_recipe: Tiny, tmp_path: Path, left_s: float, saved: int
) -> None:
    """A save of two minutes began a minute ago when the stop comes: another would be done in three."""
    run, now = Counting(9), [0.0]
    asked: list[float] = []

    def time_to_save(needed_s: float) -> bool:
        asked.append(needed_s)
        run.gate.set()
        return needed_s <= left_s

    with MetricsWriter(tmp_path) as metrics:
        steps = steps_of(
            run,
            tiny_recipe(),
            tmp_path,
            metrics,
            should_stop=lambda: run.done == 5,
            time_to_save=time_to_save,
            clock=lambda: now[0],
        )
        next(steps), next(steps)  # the first save begins
        now[0] = 120.0
        run.gate.set()
        run.gate = threading.Event()
        next(steps), next(steps)  # it is finished, and the second begins
        now[0] += 60.0
        list(steps)
    assert asked == [pytest.approx(180.0)]
    assert max(checkpoint.step_folders(tmp_path / "checkpoints")) == saved


def test_the_run_goes_on_while_a_checkpoint_is_written(tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = Counting(6)
    with MetricsWriter(tmp_path) as metrics:
        progress = steps_of(run, tiny_recipe(), tmp_path, metrics)
        assert [next(progress).saved for _ in range(3)] == [None] * 3  # the checkpoint of step 2 is under way
        assert checkpoint.newest(tmp_path / "checkpoints", print) is None
        run.gate.set()
        saved = [one.saved.step for one in progress if one.saved is not None]
    assert saved[-1] == 6
    manifests = [
        json.loads((tmp_path / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_bytes()) for step in (2, 4, 6)
    ]
    assert [manifest["parent"] for manifest in manifests] == [None, manifests[0]["root"], manifests[1]["root"]]
    assert [record["step"] for record in read_metrics(tmp_path) if record["kind"] == "checkpoint"] == [2, 4, 6]
    for step in (2, 4, 6):
        state, manifest = checkpoint.load(tmp_path / "checkpoints" / f"step_{step:08d}")
        assert len(manifest["files"]) == 2
        assert state.tensors["weights/a"].tolist() == [float(step)] * 8  # as it was then, though the run went on


def test_a_checkpoint_that_fails_ends_the_run_and_leaves_the_older_one(tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = Counting(8, error_at=4)
    run.gate.set()
    with MetricsWriter(tmp_path) as metrics, pytest.raises(CheckpointError, match="no room"):
        list(steps_of(run, tiny_recipe(), tmp_path, metrics))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_who_stops_early_waits_for_what_was_begun(tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = Counting(6)
    with MetricsWriter(tmp_path) as metrics:
        progress = steps_of(run, tiny_recipe(), tmp_path, metrics)
        next(progress), next(progress), next(progress)
        threading.Timer(0.3, run.gate.set).start()
        progress.close()  # type: ignore[attr-defined]
    assert checkpoint.newest(tmp_path / "checkpoints", print) == tmp_path / "checkpoints" / "step_00000002"


def test_a_folder_that_cannot_be_removed_is_told_and_the_run_goes_on(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr("weftrain.core.saving.fsops.remove_tree", refuse)
    run = Counting(8)
    run.gate.set()
    with MetricsWriter(tmp_path) as metrics:
        recipe = tiny_recipe("crystal", "checkpoint.keep={last: 1}")
        done = list(steps_of(run, recipe, tmp_path, metrics))
    assert len(done) == 8
    assert sorted(checkpoint.step_folders(tmp_path / "checkpoints")) == [8]
    assert any("cannot be removed now: Device or resource busy" in said for one in done for said in one.problems)
