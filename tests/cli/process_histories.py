"""Random histories of runs of several processes: which there are, one life after the other, and what each must end with.

A history is a sequence of lives of one run. In each, processes are killed or signalled at moments that its seed draws; the
last is left alone. What must come of it is told by the run that nothing happened to.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from histories import Told
from launchpad import Launchpad
from torch.distributed import TCPStore

from weftrain.core import checkpoint
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.formats.strict_yaml import dump_yaml
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.metrics import digest

STEPS = 12
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SHUTDOWN_S = 30  # torchrun's --shutdown-timeout
PATIENCE_S = 300  # without a word of any process, until one that should end counts as one that hangs

REPLAYABLE = ("precision.numerics=replayable", "model.dropout=0.1", "backend.options.parallel=ddp")
# What runs are of: words of the recipe, and the numbers of processes that each life may have.
KINDS: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "alone": ("local", (), (1,)),
    "replayable": ("cuda", REPLAYABLE, (1, 2, 4)),
    "fsdp": ("cuda", (), (2,)),
    "fsdp 4": ("cuda", (), (4,)),
    "copies": ("cuda", ("backend.options.memory_copies_every_steps=2",), (2,)),
    "ram": ("streaming", ("backend.options.tier=ram",), (1,)),
    "direct": ("streaming", ("backend.options.tier=direct",), (1,)),
    "mapped": ("streaming", ("backend.options.tier=mapped",), (1,)),
    "replicas": ("streaming", ("backend.options.tier=direct",), (2,)),
    "sharded": ("streaming", ("backend.options.tier=mapped", "backend.options.fabric=sharded"), (2,)),
}
MODEL = (
    "model.vocab_size=600",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.intermediate_size=24",
    "model.rotary_dim=4",
    "model.max_position_embeddings=16",
    "model.mup.base_hidden_size=16",
    "schedule.learning_rate=[{shape: linear, steps: 2, start: 0, end: 0.01}, {shape: constant, steps: 99, start: 0.01}]",
    "log.evaluate_every_steps=0",
    "log.tensorboard=false",
)
BATCH = "batch.global_batch_size"
PLANS = (
    "",
    f"changes=[{{step: 5, set: {{{BATCH}: 8}}}}]",
    f"changes=[{{step: 4, set: {{data.sources.0.weight: 0.3, data.sources.1.weight: 0.7}}}}, {{step: 9, set: {{{BATCH}: 12}}}}]",
    f"changes=[{{step: 3, set: {{data.sequence_length: 4, {BATCH}: 8}}}}, {{step: 7, set: {{data.sequence_length: 8}}}}]",
    "changes=[{step: 6, set: {data.skip.0: {source: a, rows: [3, 9], reason: noise}}}]",
)


@dataclass(frozen=True)
class Life:
    """processes: that take part. faults: (process, signal, at its how-manieth moment). after_s: a process that is killed
    from outside so many seconds after the start. grace: `--grace`. asks: a file `save-now` lies there from the start.
    """

    processes: int
    faults: tuple[tuple[int, int, int], ...] = ()
    after_s: tuple[int, float] | None = None
    grace: float | None = None
    asks: bool = False


@dataclass
class Runs:
    """Where lives take place. data: the folder of the datasets."""

    launchpad: Launchpad
    data: Path
    memory: Path
    lives: int = 0
    straight: dict[tuple[str, str], Told] = field(default_factory=dict)

    def words(self, kind: str, plan: str, processes: int) -> list[str]:
        """RECIPE and overrides of `weftrain train`. The file of the recipe is written once."""
        file = self.data.parent / "recipes" / f"{kind} {PLANS.index(plan)}.yaml"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            recipe = load_recipe("crystal_demo", self._overrides(kind, plan)).recipe
            file.write_text(dump_yaml(recipe.model_dump(mode="json")))
        return [str(file), f"batch.replicas={processes}"]

    def _overrides(self, kind: str, plan: str) -> list[str]:
        backend, more, _ = KINDS[kind]
        sources = "data.sources=[{name: a, path: a, weight: 0.6}, {name: b, path: b, weight: 0.4}]"
        shape = [f"schedule.steps={STEPS}", f"{BATCH}=4", "batch.micro_batch_size=1", "batch.replicas=1"]
        of_backend = [f"backend.name={backend}", "backend.options={device: cpu, threads: 1, huge_pages: false}", *more]
        if "memory_copies" in "".join(more):
            of_backend.append(f"backend.options.memory_copies_folder={self.memory}")
        data = [
            f"data.root={self.data}",
            "data.synthetic_rows=null",
            "data.sequence_length=8",
            "data.row_length=8",
            sources,
        ]
        plans = [plan] if plan else []
        log = ["log.every_steps=1", "precision.compute=float32"]
        return [*MODEL, *data, *shape, *of_backend, *log, *plans]

    def live(self, run: Path, words: Sequence[str], life: Life, kind: str) -> tuple[list[int], str]:
        """One life: exit codes of its processes, and what they printed."""
        self.lives += 1
        place = run.parent / f"life-{self.lives}"
        place.mkdir(parents=True)
        self.memory.mkdir(exist_ok=True)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        if life.asks and run.exists():
            (run / "save-now").touch()
        started, begun = [], time.monotonic()
        for rank in range(life.processes):
            faults = [(number, at) for process, number, at in life.faults if process == rank]
            environment = _environment(rank, life.processes, store.port) if KINDS[kind][0] == "cuda" else {}
            of_run = ["train", "--runs", run.parent, "--run", run.name, *words]
            of_run += [] if life.grace is None else [f"--grace={life.grace}"]
            (place / f"{rank}.txt").touch()  # a process that is killed early may not have opened it
            if rank and KINDS[kind][0] == "streaming":
                of_run = ["replica", run, "--wait", "200"]
            started.append(self.launchpad.start(of_run, place / f"{rank}.txt", environment, faults))
        codes = self._ended(started, life, begun, place)
        output = "".join(f"[{rank}] {(place / f'{rank}.txt').read_text()}" for rank in range(life.processes))
        fired = [*place.glob("*.signals")]
        self.told = f"{life} -> {codes}, {len(fired)} signalled"
        if not fired and life.after_s is None:
            assert set(codes) == {0}, output
        return codes, output

    def _ended(self, started: list[int], life: Life, begun: float, place: Path) -> list[int]:
        """Wait for all. When one has failed, the others are asked to end, and later killed, as torchrun does."""
        due = [(begun + life.after_s[1], signal.SIGKILL, [started[life.after_s[0]]])] if life.after_s else []
        failed, heard, told = False, begun, list[int]()
        while True:
            ended = {process: code for process, code in self.launchpad.codes().items() if process in started}
            if len(ended) == len(started):
                return [ended[process] for process in started]
            now = time.monotonic()
            if not failed and any(ended.values()):
                failed = True
                due += [(now + 0.3, signal.SIGTERM, started), (now + SHUTDOWN_S, signal.SIGKILL, started)]
            for one in [one for one in due if one[0] <= now]:
                due.remove(one)
                for process in set(one[2]) - set(ended):
                    os.kill(process, one[1])
            before, told = told, [len(ended), *(file.stat().st_size for file in place.glob("*.txt"))]
            heard = heard if told == before else now  # on a busy machine a life takes long, but it is no silence
            assert now - heard < PATIENCE_S, f"processes {set(started) - set(ended)} of {started} do not end: {life}"
            time.sleep(0.01)


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """As torchrun sets it, whose agent holds the store."""
    if size == 1:
        return {}
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    more = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**more, **{name: str(value) for name, value in own.items()}}


class History:
    """One history, drawn from a seed. `run` lives it, `check` compares it with the run that nothing happened to."""

    def __init__(self, seed: int, runs: Runs, folder: Path, kind: str = "") -> None:
        self.draw, self.runs, self.run = random.Random(seed), runs, folder / "runs" / "run"
        self.kind = self.draw.choice(sorted(KINDS))
        self.kind = kind or self.kind
        self.plan = self.draw.choice(PLANS)
        if self.kind in ("replicas", "sharded"):  # which leave a run where its recipe changes
            self.plan = ""
        self.keep = self.draw.random() < 0.5
        self.own = [f"checkpoint.every_steps={self.draw.choice([2, 3, 5])}"]
        self.own += ["checkpoint.keep={last: 2, every_steps: 6}"] if self.keep else []
        self.told: list[str] = []

    def lives(self) -> Iterator[Life]:
        draw, sizes = self.draw, KINDS[self.kind][2]
        for _ in range(draw.randint(1, 3)):
            size = draw.choice(sizes)
            faults, after = [], None
            what = draw.choice(["killed", "killed", "stopped", "stopped", "saves", "killed outside"])
            process, at = draw.randrange(size), int(10 ** draw.uniform(0.5, 3.2))
            if what == "killed":
                faults.append((process, int(signal.SIGKILL), at))
            elif what == "stopped":
                faults.append((process, int(draw.choice(STOPS)), at))
            elif what == "saves":
                faults.append((process, int(signal.SIGUSR2), at))
            else:
                after = process, draw.uniform(0.1, 4)
            grace = draw.choice([None, None, 30.0, 0.0])
            yield Life(size, tuple(faults), after, grace, asks=draw.random() < 0.2)
        yield Life(draw.choice(sizes))

    def words(self, processes: int) -> list[str]:
        return [*self.runs.words(self.kind, self.plan, processes), *self.own, "--allow=batch.replicas"]

    def lived(self) -> None:
        codes: list[int] = []
        for life in self.lives():
            if self.is_complete():
                return
            codes, output = self.runs.live(self.run, self.words(life.processes), life, self.kind)
            self.told += [self.runs.told, output[-1500:]]
            stops = [number for _, number, _ in life.faults if number != signal.SIGUSR2]
            asked = {0, *(sign for number in (*stops, signal.SIGTERM) for sign in (128 + number, -number))}
            assert set(codes) <= (
                asked if life.after_s is None and signal.SIGKILL not in stops else {*asked, 1, 2, 3, -9}
            )
        assert set(codes) == {0}
        assert self.is_complete()

    def is_complete(self) -> bool:
        return (self.run / "ledger.jsonl").exists() and Told(self.run).lines[-1]["kind"] == "end"

    def straight(self) -> Told:
        key = self.kind, self.plan
        if key not in self.runs.straight:
            run = self.runs.data.parent / "straight" / f"{sorted(KINDS).index(self.kind)}-{PLANS.index(self.plan)}"
            size = min(KINDS[self.kind][2])
            words = [*self.runs.words(self.kind, self.plan, size), "checkpoint.every_steps=1"]
            self.runs.live(run, words, Life(size), self.kind)
            self.runs.straight[key] = Told(run)
        return self.runs.straight[key]

    def check(self) -> None:
        wanted, told = self.straight(), Told(self.run)
        assert [line["step"] for line in wanted.checkpoints] == list(range(1, STEPS + 1))
        assert told.losses() == wanted.losses()
        assert told.skips == wanted.skips == []
        check_checkpoints(told, wanted)
        steps = [line["step"] for line in told.checkpoints]
        every = int(self.own[0].rpartition("=")[2])
        assert {step for step in range(1, STEPS + 1) if step % every == 0} | {STEPS} <= set(steps)
        present = told.present()
        assert set(present) <= set(steps)
        if self.keep:
            assert {step for step in steps if step % 6 == 0} | set(steps[-2:]) <= set(present)
        for step in present:
            found, there = (
                checkpoint.load(run / "checkpoints" / folder_name(step))[0] for run in (self.run, wanted.run)
            )
            assert (found.step, found.optimizer_updates) == (there.step, there.optimizer_updates)
            assert set(found.tensors) == set(there.tensors)
            assert all(torch.equal(found.tensors[name], there.tensors[name]) for name in there.tensors), step
        assert not list(self.run.glob("**/.tmp-*"))


def check_checkpoints(told: Told, wanted: Told) -> None:
    """The ledger's checkpoints are one chain, each entered once, and each says what was measured since the one before."""
    steps, parent = [line["step"] for line in told.checkpoints], None
    assert steps == sorted(set(steps))
    for line in told.checkpoints:
        step, before = line["step"], parent
        assert line["parent"] == before
        parent = line["root"]
        measured: list[dict[str, Any]] = [
            one for (_, at), one in told.measured.items() if line["metrics_after"] < at <= step
        ]
        assert line["metrics_sha256"] == digest([{**one, "loss": float(one["loss"])} for one in measured])
        if manifest := told.manifest(step):
            assert (manifest["root"], manifest["parent"]) == (line["root"], before)
            for key in ("position", "tokens", "optimizer_updates", "sources"):
                assert manifest[key] == wanted.manifest(step)[key], key
        else:
            assert line["root"] in told.removed
