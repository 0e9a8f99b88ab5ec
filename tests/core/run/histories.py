"""Random histories of a run, and what each must end with, told without the code that they test.

`live` is one process of the run: it starts as `weftrain train` does and trains until it is done, stopped, or dead.
`Told` reads ledger and metrics once more, line by line, by rules of its own.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from weftrain.backends.null import NullBackend, NullRun
from weftrain.core.backend import Backend, Job, Plan, Run, State, StepResult
from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.batch import Batch, BatchSource
from weftrain.core.parameters import parameter_specs
from weftrain.core.resume import commit, decide, settle
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.metrics import MetricsWriter
from weftrain.core.run.prepare import prepare_run
from weftrain.core.run.run_folder import open_run
from weftrain.core.run.speed import Peak, Speed
from weftrain.core.trainer import fit

_NAME = "weights/layers.0.attention_norm.weight"  # of 48 numbers


class FoldingRun(NullRun):
    """A model that is nothing but a hash: of its first weights, and of every row, rate and update since, in order. About
    every sixteenth step is skipped.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._groups = parameter_groups(job.recipe.model, job.recipe.optimizer)
        specs, planes = parameter_specs(job.recipe.model), ("weights", "exp_avg", "exp_avg_sq")
        tensors = {f"{plane}/{spec.name}": torch.zeros(spec.shape) for plane in planes for spec in specs}
        self._state = State(job.plan.start_step, 0, tensors)

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        recipe = self._job.recipe
        for step in range(self._state.step, self._job.plan.last_step):
            batch = source.rows(step, 0, recipe.batch.global_batch_size)
            rates = group_learning_rates(self._groups, recipe.schedule, step)
            seen = hashlib.sha256(repr((step, rates)).encode() + _weights(self._state).tobytes() + batch.ids.tobytes())
            digest = seen.digest()
            skipped, updates, tensors = digest[0] < 16, self._state.optimizer_updates, self._state.tensors
            if not skipped:
                tensors, updates = {**tensors, _NAME: tensors[_NAME].clone()}, updates + 1
                tensors[_NAME][:32] = torch.tensor([*digest], dtype=torch.float32)
            self._state = State(step + 1, updates, tensors)
            loss = float("nan") if skipped else int.from_bytes(digest[1:4]) / 2**24
            yield StepResult(step, loss, 1.0, rates, recipe.tokens_per_step, recipe.tokens_per_step, 1.0, 0.0, skipped)


def _weights(state: State) -> Any:
    return state.tensors[_NAME][:32].numpy()


class FoldingBackend(NullBackend):
    def prepare(self, job: Job) -> FoldingRun:
        return FoldingRun(job)


class HeldOut:
    """An evaluator whose loss is the state's."""

    def is_due(self, plan: Plan, completed: int) -> bool:
        return plan.wants_evaluation(completed)

    def is_due_at_start(self, plan: Plan, scored: Set[str]) -> bool:
        return False

    def measure(self, run: Run, completed: int) -> Iterator[Mapping[str, Any]]:
        loss = 1 + float(_weights(run.export_state())[:4].sum()) / 1024
        yield {"kind": "evaluation", "step": completed, "set": "held", "loss": loss, "tokens": 64}


class Clock:
    """Wall clock and monotonic one; the first jumps by up to a month in both directions, the second forwards alone."""

    def __init__(self, seed: int) -> None:
        self._random, self._wall, self._monotonic = random.Random(seed), 1.8e9, 0.0

    def wall(self) -> float:
        self._wall += 1 if self._random.random() < 0.95 else self._random.uniform(-2.6e6, 2.6e6)
        return self._wall

    def monotonic(self) -> float:
        self._monotonic += 1 if self._random.random() < 0.98 else self._random.uniform(0, 1000)
        return self._monotonic


class Watched:
    """A source that notes which rows each step was made of."""

    def __init__(self, source: BatchSource, rows: dict[int, list[str]]) -> None:
        self._source, self._rows = source, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def rows(self, step: int, first: int, count: int) -> Batch:
        names = self._source.sample_names(step, first, count)
        self._rows[step] = names if first == 0 else [*self._rows[step][:first], *names]
        return self._source.rows(step, first, count)


@dataclass
class Life:
    """How a process of the run ends, if not by a fault. stop_at: completed steps after which a signal comes; saves: of
    which a save is asked for. no_time: a stop comes too late for a save.
    """

    stop_at: int = 1 << 30
    saves: Set[int] = frozenset()
    no_time: bool = False


@dataclass
class World:
    """What outlives the processes of a run: its folder, its clocks, and the test's own note of the rows read."""

    folder: Path
    clock: Clock
    backend: Backend
    rows: dict[int, list[str]] = field(default_factory=dict)

    def live(self, recipe: Recipe, life: Life = Life(), allow: Set[str] = frozenset()) -> bool:  # noqa: B008
        """One process. Whether the run is complete."""
        with pytest.MonkeyPatch.context() as patch:
            defaults = Ledger.__init__.__kwdefaults__
            patch.setitem(defaults, "clock", self.clock.wall)  # type: ignore[arg-type]
            with open_run(self.folder, recipe.model_dump(mode="json")) as opened:
                while True:
                    options = self.backend.options()
                    start = decide(
                        opened,
                        recipe,
                        training_source(recipe),
                        self.backend,
                        options,
                        self.folder.parent,
                        allow=allow,
                        say=lambda line: None,
                    )
                    if start.complete:
                        settle(start)
                        return True
                    done = self._train(start, options, life)
                    if done >= life.stop_at or done not in start.plan.change_steps:
                        return done == start.recipe.schedule.steps

    def _train(self, start: Any, options: Any, life: Life) -> int:
        run = prepare_run(self.backend, start.job(options))
        if start.state is not None:
            run.import_state(start.state)
        ledger, done = commit(start, {}), start.plan.start_step
        with MetricsWriter(self.folder, start.resumed_step, repaired=True, clock=self.clock.wall) as metrics:
            place = (Watched(start.source, self.rows), [HeldOut()], start.folder.checkpoints, metrics, ledger)
            steps = fit(
                run,
                start.plan,
                start.recipe,
                *place,
                speed=Speed(1.0, Peak(None, "")),
                history=start.history,
                should_stop=lambda: done + 1 >= life.stop_at,
                should_save=lambda: done + 1 in life.saves,
                time_to_save=lambda needed_s: not life.no_time,
                clock=self.clock.monotonic,
            )
            for step in steps:
                done = step.result.step + 1
            if done == start.recipe.schedule.steps:
                metrics.event("end", step=done)
                ledger.add("end", step=done)
        run.close()
        return done


class Told:
    """What a run's ledger and metrics say, by rules of its own. segments: [first step, recipe] on the line."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
        self.checkpoints: list[dict[str, Any]] = []
        self.segments: list[tuple[int, dict[str, Any]]] = []
        self.skips: list[int] = []
        self.chunk_ends: dict[int, tuple[int, int]] = {}  # place -> chunk, step
        self.removed: set[str] = set()
        self.decisions: list[tuple[int, str]] = []
        recipe: dict[str, Any] = {}
        before = None
        for number, line in enumerate(self.lines):
            text = {key: value for key, value in line.items() if key != "hash"}
            packed = json.dumps(text, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
            assert (line["n"], line["previous"]) == (number, before)
            assert hashlib.sha256(packed).hexdigest() == line["hash"]
            before, kind, step = line["hash"], line["kind"], line["step"]
            recipe = line.get("recipe", recipe)
            if kind in ("start", "resume", "rollback"):
                self._cut(step)
            if kind in ("start", "resume"):
                self.segments.append((step, recipe))
            elif kind == "checkpoint":
                self.checkpoints.append(line)
                self.removed.discard(line["root"])
            elif kind == "skip":
                self.skips = [one for one in self.skips if one != step] + [step]
            elif kind == "chunk_end":
                assert line["place"] not in self.chunk_ends
                self.chunk_ends[line["place"]] = line["chunk"], step
            elif kind == "remove":
                self.removed |= {root for _, root, _ in line["removed"]}
            elif kind == "defer":
                self.decisions.append((line["chunk"], line["action"]))
        self.measured = self._measured()

    def _cut(self, step: int) -> None:
        self.checkpoints = [line for line in self.checkpoints if line["step"] <= step]
        self.segments = [one for one in self.segments if one[0] < step]
        self.skips = [one for one in self.skips if one <= step]
        self.chunk_ends = {place: one for place, one in self.chunk_ends.items() if one[1] <= step}

    def _measured(self) -> dict[tuple[str, int], dict[str, Any]]:
        found: dict[tuple[str, int], dict[str, Any]] = {}
        path = self.run / "metrics.jsonl"  # which a run that was killed before its first line does not have
        for text in path.read_text().splitlines() if path.exists() else ():
            line = json.loads(text)
            if line["kind"] == "resume":
                found = {key: one for key, one in found.items() if key[1] <= line["step"]}
            elif line["kind"] in ("step", "evaluation"):
                found.pop((line["kind"], line["step"]), None)
                found[line["kind"], line["step"]] = line
        return found

    def losses(self) -> dict[tuple[str, int], Any]:
        return {key: line["loss"] for key, line in self.measured.items()}

    def manifest(self, step: int) -> dict[str, Any]:
        path = self.run / "checkpoints" / f"step_{step:08d}" / "manifest.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def present(self) -> list[int]:
        names = [path.name for path in (self.run / "checkpoints").iterdir()]
        assert all(name.startswith("step_") and "." not in name for name in names), names
        return sorted(int(name.removeprefix("step_")) for name in names)
