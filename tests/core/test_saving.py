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
from weftrain.core.errors import CheckpointError
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


def steps_of(run: Counting, recipe: Recipe, folder: Path, metrics: MetricsWriter) -> Iterator[TrainedStep]:
    plan = Plan(0, run.steps, checkpoint_every_steps=2)
    source = synthetic_source(97, 13, 12, 4, seed=5)
    return fit(
        run, plan, recipe, source, [], folder / "checkpoints", metrics, Ledger(folder), speed=Speed(1.0, Peak(None, ""))
    )  # type: ignore[arg-type]


def test_the_run_goes_on_while_a_checkpoint_is_written(tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = Counting(6)
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
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
    with MetricsWriter(tmp_path, tensorboard=False) as metrics, pytest.raises(CheckpointError, match="no room"):
        list(steps_of(run, tiny_recipe(), tmp_path, metrics))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_who_stops_early_waits_for_what_was_begun(tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = Counting(6)
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
        progress = steps_of(run, tiny_recipe(), tmp_path, metrics)
        next(progress), next(progress), next(progress)
        threading.Timer(0.3, run.gate.set).start()
        progress.close()  # type: ignore[attr-defined]
    assert checkpoint.newest(tmp_path / "checkpoints", print) == tmp_path / "checkpoints" / "step_00000002"
