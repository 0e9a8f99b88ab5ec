"""Random histories of a run: kills at any file operation, signals, clocks that jump, retention, changes and rollbacks.

However often and wherever it is interrupted, a run ends with the state, the order of rows and the measurements of one
that never was, and with a ledger that tells how it came about.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import written_datasets
from fault_injection import DEATHS, ERRORS, Death, Faults, injected
from histories import Clock, FoldingBackend, Life, Told, World

from weftrain.analysis.report.collect import collect
from weftrain.backends.local import BACKEND as LOCAL
from weftrain.core.backend import Backend
from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError, RunFolderError, WeftrainError
from weftrain.core.formats import fsops
from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.lineage import lineage, with_decisions
from weftrain.core.run.metrics import digest
from weftrain.core.run.rollback import defer_chunk, rollback

Tiny = Callable[..., Recipe]
STEPS = 24
BATCH = ("batch.global_batch_size", "batch.micro_batch_size")
BY_HAND = ("batch", "weights", "skip", "length")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written_datasets, "VOCAB", 600)
        written_datasets.make_dataset(root / "a", [40])
        written_datasets.make_dataset(root / "b", [30], first_id=330)
    return root


@pytest.fixture
def recipe_of(tiny_recipe: Tiny, datasets: Path) -> Callable[..., Recipe]:
    sources = "data.sources=[{name: a, path: a, weight: 0.6}, {name: b, path: b, weight: 0.4}]"
    base = [
        "model.vocab_size=600",
        "data.sequence_length=8",
        "data.synthetic_rows=null",
        sources,
        f"schedule.steps={STEPS}",
    ]
    base += [f"data.root={datasets}", "backend.options={}", "log.evaluate_every_steps=3"]
    base += ["optimizer.non_finite=skip", "optimizer.max_skip_share=1", "optimizer.max_consecutive_skips=24"]
    return functools.cache(lambda *more: tiny_recipe("crystal", *base, *more))


@pytest.fixture(autouse=True)
def _no_power_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deaths here are those of processes: what was written is there, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class History:
    """One history, drawn from a seed, and the run that it must end like."""

    def __init__(self, seed: int, folder: Path, recipe_of: Callable[..., Recipe], backend: Backend) -> None:
        self.backend = backend
        self.draw, self.folder, self.recipe_of = random.Random(seed), folder, recipe_of
        self.kind = self.draw.choice(["plain", "plain", "chunks", "planned", *BY_HAND])
        self.overrides = [f'backend.name="{backend.name}"', f"checkpoint.every_steps={self.draw.choice([3, 4, 5, 8])}"]
        if self.draw.random() < 0.5:
            self.overrides.append("checkpoint.every_minutes=1")
        self.keep = self.draw.random() < 0.5
        if self.keep:
            self.overrides.append("checkpoint.keep={last: 2, every_steps: 10}")
        if self.kind == "chunks":
            self.overrides.append("data.chunks=4")
        if self.kind == "planned":
            batch = "batch.global_batch_size: 6, batch.micro_batch_size: 6"
            self.overrides.append(
                f"changes=[{{step: 7, set: {{{batch}}}}}, {{step: 16, set: {{optimizer.beta2: 0.9}}}}]"
            )
        self.values: dict[str, Any] = dict.fromkeys(BATCH, 4)  # by hand, since the last start
        if self.kind == "length":
            self.overrides.append("data.row_length=8")
        self.world = World(folder / "runs" / "run", Clock(seed), backend)
        self.skipped: list[str] = []
        self.told: list[str] = []

    def recipe(self) -> Recipe:
        recipe = self.recipe_of(*self.overrides, *(f"{key}={value}" for key, value in self.values.items()))
        path = self.world.folder / "ledger.jsonl"
        if self.kind == "chunks" and path.exists():  # as `train` lays the ledger's decisions over what it is asked for
            skip = with_decisions(recipe.data, lineage(read_ledger(path)).decisions)
            tree = recipe.model_dump(mode="json")
            recipe = Recipe.from_record({**tree, "data": {**tree["data"], "skip": skip}})
        return recipe

    @property
    def allow(self) -> set[str]:
        weights = (f"data.sources.{number}.weight" for number in range(2))
        changed = {*BATCH, *weights, "data.sequence_length", *(f"data.skip.{number}" for number in range(8))}
        return changed | ({"data"} if self.kind in BY_HAND else set())

    def run(self) -> None:
        for _ in range(self.draw.randint(2, 6)):
            with self._faulty():
                self._live()
            with self._faulty():
                self._between()
        assert self.world.live(self.recipe(), allow=self.allow)
        assert self.world.live(self.recipe(), allow=self.allow)  # which is complete

    def _live(self) -> None:
        stop = self.draw.choice([1 << 30, self.draw.randint(1, STEPS)])
        saves = {self.draw.randint(1, STEPS) for _ in range(self.draw.randint(0, 3))}
        life = Life(stop, saves, no_time=self.draw.random() < 0.3)
        self.told.append(f"lives: {life}")
        self.world.live(self.recipe(), life, self.allow)

    @contextlib.contextmanager
    def _faulty(self) -> Iterator[None]:
        """Whatever is done in the block fails or dies at one of its file operations, or at none."""
        kind = self.draw.choice([*DEATHS, *DEATHS, *ERRORS, ""])
        faults = Faults(kind, self.draw.randint(0, 350) if kind else None)
        try:
            with injected(faults):
                yield
        except Death:
            pass
        except (WeftrainError, OSError):
            if kind not in ERRORS or faults.at is None or len(faults.trace) <= faults.at:
                raise  # no fault made it: it was refused
        self.told.append(f"{kind} at {faults.at} of {len(faults.trace)}")

    def _between(self) -> None:
        what = self.draw.choice(["nothing", "nothing", "rollback", "change"])
        ledger_file = self.world.folder / "ledger.jsonl"
        if what == "nothing" or not ledger_file.exists():
            return
        if what == "rollback":
            line = lineage(read_ledger(ledger_file))
            there = [point.step for point in line.checkpoints if point.root not in line.removed]
            if len(there) > 1:
                step = self.draw.choice(there[:-1])
                self.told.append(f"rolls back to {step} of {there}")
                ledger = Ledger(self.world.folder, clock=self.world.clock.wall)
                with contextlib.suppress(CheckpointError if self.keep else ()):
                    rollback(self.world.folder, ledger, step, "a spike")
        elif self.kind in BY_HAND:
            self._change()
            self.told.append(f"changes {self.values}")
        elif self.kind == "chunks":
            action: Any = self.draw.choice(["defer", "drop"])
            chunk = self.draw.randrange(4)
            self.told.append(f"{action} {chunk}")
            ledger = Ledger(self.world.folder, clock=self.world.clock.wall)
            with contextlib.suppress(RunFolderError):  # it is trained or decided already, or a fault
                defer_chunk(self.world.folder, ledger, self.recipe(), chunk, action, "a spike")

    def _change(self) -> None:
        if self.kind == "batch":
            self.values |= dict.fromkeys(BATCH, self.draw.choice([2, 4, 6]))
        elif self.kind == "weights":
            weight = self.draw.choice([0.25, 0.5, 0.75])
            self.values |= {"data.sources.0.weight": weight, "data.sources.1.weight": 1 - weight}
        elif self.kind == "length":
            self.values["data.sequence_length"] = self.draw.choice([2, 4, 8])
        elif len(self.skipped) < 3:
            first = 10 * len(self.skipped) + self.draw.randrange(5)
            self.skipped.append(f"{{source: a, rows: [{first}, {first + self.draw.randint(1, 5)}], reason: noise}}")
            self.values["data.skip"] = f"[{', '.join(self.skipped)}]"

    def straight(self) -> World:
        """The run that was never interrupted, with the changes that the ledger of this one records."""
        world = World(self.folder / "straight" / "run", Clock(0), self.backend)
        every = frozenset(range(STEPS))
        overrides, self.overrides = self.overrides, [one for one in self.overrides if "keep" not in one]
        try:
            if self.kind not in BY_HAND:
                assert world.live(self.recipe(), Life(saves=every), self.allow)
                return world
            segments = Told(self.world.folder).segments
            for (_, recorded), (stop, _) in zip(segments, [*segments[1:], (STEPS, {})], strict=True):
                world.live(self._as_recorded(recorded), Life(stop, every), self.allow)
            return world
        finally:
            self.overrides = overrides

    def _as_recorded(self, recorded: dict[str, Any]) -> Recipe:
        """The recipe of a stretch of the run as somebody asked for it."""
        tree = self.recipe().model_dump(mode="json")
        kept = {key: recorded["data"].get(key, tree["data"][key]) for key in ("sources", "sequence_length", "skip")}
        return Recipe.from_record({**tree, "batch": recorded["batch"], "data": {**tree["data"], **kept}})

    def check(self) -> None:
        straight = self.straight()
        told, wanted = Told(self.world.folder), Told(straight.folder)
        assert self.world.rows == straight.rows
        assert told.losses() == wanted.losses()
        assert told.skips == wanted.skips
        assert [line["step"] for line in wanted.checkpoints] == list(range(1, STEPS + 1))
        steps = [line["step"] for line in told.checkpoints]
        recipe = self.recipe()
        planned = {step for step in range(1, STEPS + 1) if step % recipe.checkpoint.every_steps == 0} | {STEPS}
        assert steps == sorted(set(steps))
        assert planned <= set(steps)
        parent = None
        for line in told.checkpoints:
            step, before = line["step"], parent
            assert line["parent"] == before
            parent = line["root"]
            measured = [one for (_, at), one in told.measured.items() if line["metrics_after"] < at <= step]
            assert line["metrics_sha256"] == digest([{**one, "loss": float(one["loss"])} for one in measured])
            if manifest := told.manifest(step):
                assert (manifest["root"], manifest["parent"]) == (line["root"], before)
                assert manifest["tensors"] == wanted.manifest(step)["tensors"]
                for key in ("position", "tokens", "optimizer_updates"):
                    assert manifest[key] == wanted.manifest(step)[key]
            else:
                assert line["root"] in told.removed
        present = told.present()
        assert set(present) <= set(steps)
        if self.keep:
            assert {step for step in steps if step % 10 == 0} | set(steps[-2:]) <= set(present)
        assert told.chunk_ends == wanted.chunk_ends
        page = collect(self.world.folder, lambda recipe: ())  # whatever the clock did meanwhile
        assert [point.step for point in page.checkpoints if point.abandoned is None] == steps
        assert all(start.first_step <= start.kept <= start.reached for start in page.starts)
        assert not list(self.world.folder.glob(f"**/{fsops.TEMPORARY_PREFIX}*"))


def lived(seed: int, folder: Path, recipe_of: Callable[..., Recipe], backend: Backend | None = None) -> History:
    history = History(seed, folder, recipe_of, backend or FoldingBackend())
    try:
        history.run()
        history.check()
    except BaseException as error:
        error.add_note(f"seed {seed}, {history.kind} {history.overrides}:\n" + "\n".join(history.told))
        raise
    return history


@pytest.mark.parametrize("seed", [7, 11])
def test_a_history(seed: int, tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    lived(seed, tmp_path, recipe_of)


@pytest.mark.prove
@pytest.mark.parametrize("first", range(100, 112, 4))
def test_more_histories(first: int, tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    for seed in range(first, first + 4):
        lived(seed, tmp_path / str(seed), recipe_of)


@pytest.mark.soak
@pytest.mark.timeout(900)  # a busy machine takes five minutes
def test_forty_histories(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    """Among them are one that a fault ended in each way, and one of each kind of change."""
    told = [lived(seed, tmp_path / str(seed), recipe_of) for seed in range(100, 140)]
    assert {history.kind for history in told} == {"plain", "chunks", "planned", *BY_HAND}
    words = "\n".join(line for history in told for line in history.told)
    assert all(word in words for word in (*DEATHS, *ERRORS, "rolls back", "changes {"))
    assert any(word in words for word in ("defer", "drop"))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_histories_of_a_model_that_learns(seed: int, tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    lived(seed, tmp_path, recipe_of, LOCAL)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_more_histories(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    first = int(os.environ.get("WEFTRAIN_FIRST_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"seeds from {first} on: WEFTRAIN_FIRST_SEED={first} draws them again")
    for seed in range(first, first + 300):
        lived(seed, tmp_path / "run", recipe_of, LOCAL if seed % 10 == 0 else None)
        shutil.rmtree(tmp_path / "run")
