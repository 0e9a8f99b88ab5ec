"""Random lives of a run and of its releases: trained, killed, gone back, chunks put off, a key changed, checkpoints
removed, released, continued as another run. Whatever comes, a release that is made verifies and replays bit for bit, and
what is not possible is refused in one line that leaves the run as it was.

`Model` is what the test itself knows of the run: which steps have a checkpoint, and so what must be possible. Each life
is drawn from a seed, and runs on the backends that need no other hardware.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from record_runs import CUT, prepare, weftrain
from release_cases import verdicts

from weftrain.core import checkpoint, trainer
from weftrain.core.run.speed import Peak

STEPS, EVERY = 6, 2  # a chunk has two steps
BACKENDS = {
    "local": ("backend.name=local", "backend.options={threads: 1}"),
    "cuda": ("backend.name=cuda", "backend.options={device: cpu, threads: 1, compile: false}"),
    "streaming": ("backend.name=streaming", "backend.options={tier: mapped, threads: 1, compile: false}"),
    "null": ('backend.name="null"', "backend.options={}"),
}
SMALL = (
    *(one for one in CUT if not one.startswith("backend.") and "num_layers" not in one),
    "model.num_layers=1",
)
BETAS = (0.9, 0.95, 0.99)


@dataclass
class Model:
    """What the test knows of a run. checkpoints: completed steps, ascending, with their states' hashes, where they are
    there; `removed` those that are not. The states of equal histories are equal, which `known` holds them to.
    """

    steps: int = STEPS
    checkpoints: dict[int, str] = field(default_factory=dict)
    removed: set[int] = field(default_factory=set)
    history: tuple[Any, ...] = ()  # what changed the states: decisions with the step that they were made at
    told: list[str] = field(default_factory=list)

    @property
    def completed(self) -> int:
        return max(self.checkpoints, default=0)

    def cut(self, step: int) -> None:
        self.checkpoints = {at: one for at, one in self.checkpoints.items() if at <= step}
        self.removed = {at for at in self.removed if at <= step}


def done(result: Result) -> str:
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def tree(folder: Path) -> dict[str, str]:
    """Every file that says something of a run, by its hash. A lock and a note beside the metrics say nothing."""
    found = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("lock", "metrics.checked")
    )
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def states(run: Path) -> dict[int, str]:
    found = {}
    for path in sorted((run / "checkpoints").glob("step_????????")) if run.exists() else []:
        manifest = checkpoint.verify(path)
        told = json.dumps({name: one["sha256"] for name, one in manifest["tensors"].items()}, sort_keys=True)
        found[manifest["step"]] = hashlib.sha256(told.encode()).hexdigest()
    return found


class Life:
    """One life, drawn from a seed, on one backend."""

    def __init__(self, seed: int, backend: str, datasets: Path, folder: Path) -> None:
        self.draw, self.folder, self.model = random.Random(seed), folder, Model()
        self.words = (*SMALL, *BACKENDS[backend], f"data.root={datasets}")
        self.backend, self.beta = backend, 0.95
        self.run = folder / "runs" / "crystal_demo"
        self.released: list[tuple[Path, Model]] = []
        self.children = 0

    def live(self) -> None:
        self.train()
        for _ in range(self.draw.randint(3, 6)):
            self.draw.choice(
                [self.train, self.killed, self.roll_back, self.defer, self.change, self.retain, self.release]
            )()
        self.train()
        self.release()
        self.resume()

    def _say(self, words: str) -> None:
        self.model.told.append(words)

    def _refused(self, result: Result, before: dict[str, str], what: str) -> None:
        """One line on stderr, exit code 2, and nothing is different in the run's folder."""
        lines = [line for line in result.stderr.splitlines() if line.startswith(("weftrain:", "Error:"))]
        assert (result.exit_code, len(lines)) == (2, 1), (what, result.output)
        assert tree(self.run) == before, what
        self._say(f"{what}: refused: {lines[0][:160]}")

    def _train(self, *more: str) -> Result:
        words = ("train", "crystal_demo", *self.words, f"optimizer.beta2={self.beta}", *more)
        allowed = ("--allow", "optimizer.beta2", *(w for n in range(3) for w in ("--allow", f"data.skip.{n}")))
        return weftrain(*words, *allowed, "--runs", self.run.parent)

    def train(self) -> None:
        done(self._train())
        self._say("trained to the end")
        self._checked(STEPS)

    def killed(self) -> None:
        """A process dies when it records a step, or when a checkpoint's line is to be entered."""
        at, record = self.draw.randrange(STEPS), trainer._Recorder.step

        def dies(own: Any, result: Any, due: bool) -> Any:
            if result.step == at:
                raise KeyboardInterrupt
            return record(own, result, due)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer._Recorder, "step", dies)
            found = self._train()
        assert found.exit_code in (0, 130), found.output
        self._say(f"killed in step {at}")
        self._checked(at // EVERY * EVERY if found.exit_code else STEPS)

    def _checked(self, reached: int) -> None:
        """The states that are there are those of the model where it knew them, and of every chunk's end."""
        found, before = states(self.run), self.model.checkpoints
        assert all(found[step] == state for step, state in before.items()), self.model.told
        new = {step: state for step, state in found.items() if step not in before}
        assert set(new) == {step for step in range(self.model.completed + 1, reached + 1) if step % EVERY == 0}, (
            self.model.told
        )
        self.model.checkpoints = dict(sorted({**before, **new}.items()))

    def roll_back(self) -> None:
        step, before = self.draw.choice([1, *range(EVERY, STEPS + 1, EVERY)]), tree(self.run)
        found = weftrain("rollback", self.run, "--to", str(step), "--reason", "a spike")
        if step in self.model.checkpoints and step < self.model.completed:
            done(found)
            self.model.cut(step)
            self._say(f"rolled back to {step}")
            assert states(self.run) == self.model.checkpoints
        elif found.exit_code:
            self._refused(found, before, f"roll back to {step}")

    def defer(self) -> None:
        chunk, before = self.draw.randrange(STEPS // EVERY), tree(self.run)
        drop = ["--drop"] if self.draw.random() < 0.3 else []
        found = weftrain("defer", self.run, "--chunk", str(chunk), "--reason", "noise", *drop)
        if found.exit_code:
            self._refused(found, before, f"defer {chunk}")
        else:
            assert self.model.completed < STEPS, "a run that is complete has no chunk to put off"
            self._say(f"deferred {chunk} {drop}")

    def change(self) -> None:
        self.beta = self.draw.choice(BETAS)
        self._say(f"beta2 {self.beta} from {self.model.completed}")

    def retain(self) -> None:
        last = self.draw.randint(1, 3)
        done(weftrain("prune", self.run, "--keep-last", str(last), "--no-chunk-ends", "--yes"))
        kept = sorted(self.model.checkpoints)[-last:]
        self.model.removed |= set(self.model.checkpoints) - set(kept)
        self.model.checkpoints = {step: self.model.checkpoints[step] for step in kept}
        assert states(self.run) == self.model.checkpoints
        self._say(f"kept the last {last}")

    def release(self) -> None:
        target, before = self.folder / f"release{len(self.released)}", tree(self.run)
        found = weftrain("release", self.run, "--to", target, "--licence", "MIT")
        if not self.model.checkpoints:
            return self._refused(found, before, "release")
        done(found)
        told = done(weftrain("replay", target))
        assert set(verdicts_of(told)) == {"equal"}, (self.model.told, told)
        self.released.append((target, Model(checkpoints=dict(self.model.checkpoints), told=list(self.model.told))))
        self._say("released and replayed")

    def resume(self) -> None:
        """Another run from any revision of any release; its own release names the parent."""
        target, model = self.draw.choice(self.released)
        revision, step = self.draw.choice(revisions_of(target))
        name = f"child{self.children}"
        self.children += 1
        own = [word for word in BACKENDS[self.backend] if word.startswith("backend.options")]
        runs = self.run.parent
        found = weftrain("resume", target, "--as", name, "--revision", revision, "--runs", runs, *own)
        if step == STEPS:
            assert found.exit_code == 2, found.output
            assert "nothing is left to train" in found.stderr
            assert not (runs / name).exists()
            found = weftrain("resume", target, "--as", name, "--runs", runs, *own, "schedule.steps=8", "data.chunks=4")
        done(found)
        child = self.folder / name
        done(weftrain("release", runs / name, "--to", child, "--licence", "MIT"))
        assert set(verdicts_of(done(weftrain("replay", child)))) == {"equal"}
        lineage = done(weftrain("verify", child, "--lineage", "--parent", target))
        assert "tensors equal" in lineage
        made = states(runs / name)
        assert made[step] == model.checkpoints[step]
        self._say(f"resumed {target.name} at {revision}: {sorted(made)}")


def verdicts_of(output: str) -> list[str]:
    class Printed:
        def __init__(self, text: str) -> None:
            self.output = text

    return verdicts(Printed(output))  # type: ignore[arg-type]


def revisions_of(target: Path) -> list[tuple[str, int]]:
    from weftrain.exchange.release.ancestry import step_of
    from weftrain.exchange.release.release import read_release, revisions

    made = read_release(target)
    return [(name, step_of(made, root)) for name, root in revisions(made)]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return prepare(tmp_path_factory.mktemp("life"))


def lived(seed: int, backend: str, datasets: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Life:
    monkeypatch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
    life = Life(seed, backend, datasets, folder)
    try:
        life.live()
    except BaseException as error:
        error.add_note(f"seed {seed} on {backend}:\n" + "\n".join(life.model.told))
        raise
    return life


PROVED = [pytest.param(*one, marks=pytest.mark.prove) for one in (("streaming", 5), ("cuda", 11))]
# a step was computed, its update was not yet made, the process died, and optimizer.beta2 was changed
PROVED.append(pytest.param("streaming", 611301, marks=pytest.mark.soak))


@pytest.mark.parametrize(("backend", "seed"), [("local", 3), ("null", 7), *PROVED])
def test_a_life(backend: str, seed: int, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lived(seed, backend, datasets, tmp_path, monkeypatch)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_many_lives(backend: str, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = int(os.environ.get("WEFTRAIN_FIRST_SEED", random.SystemRandom().randrange(1 << 30)))
    count = int(os.environ.get("WEFTRAIN_SEEDS", "40"))
    print(f"seeds from {first} on: WEFTRAIN_FIRST_SEED={first} draws them again")
    for seed in range(first, first + count):
        lived(seed, backend, datasets, tmp_path / "life", monkeypatch)
        shutil.rmtree(tmp_path / "life")
