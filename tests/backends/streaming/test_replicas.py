"""Replicas as processes of their own: the bits of one process for 1, 2 and 4 of them, joining, leaving, and being
killed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from weftrain.analysis.compare.same_state import compare
from weftrain.backends.streaming.communicator import Communicator
from weftrain.cli.assembly import open_data
from weftrain.cli.main import main
from weftrain.cli.resolve import backend_options
from weftrain.core import checkpoint
from weftrain.core.backend import Job, Plan, State
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.metrics import read_metrics

BASE = [
    "batch.micro_batch_size=1",
    "precision.compute=float32",
    "schedule.steps=6",
    "checkpoint.every_steps=0",
    "log.every_steps=1",
]
BASE += [
    "schedule.learning_rate=[{shape: linear, steps: 2, start: 0, end: 0.01}, {shape: constant, steps: 1000, start: "
    "0.01}]"
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "weftrain.cli", *arguments]


def train(folder: Path, name: str, overrides: list[str], backend: str = "streaming") -> list[str]:
    return command("train", "crystal_demo", "--runs", str(folder), "--run", name, "--backend", backend, *overrides)


@contextmanager
def started(*commands: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(item, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for item in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def masked_rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Rows of one document each, which fills half of it or more: each replica has another number of tokens that bear a
    loss.
    """
    folder, drawn = tmp_path_factory.mktemp("masked"), random.Random(1)
    (folder / "texts").mkdir()
    for number in range(100):
        (folder / "texts" / f"{number}.txt").write_text("".join(drawn.choices("abcdefgh ", k=drawn.randint(11, 17))))
    options = [
        "--name",
        "short",
        "--sequence-length",
        "13",
        "--vocab-size",
        "300",
        "--packing",
        "best_fit",
        "--output",
        str(folder),
    ]
    done = CliRunner().invoke(main, ["prep", str(folder / "texts"), *options])
    assert done.exit_code == 0, done.output
    sources = "data.sources=[{name: short, path: short, weight: 1}]"
    return [
        "data.synthetic_rows=null",
        f"data.root={folder}",
        sources,
        "model.vocab_size=332",
        "objective.normalizer=bearing_tokens",
    ]


@pytest.fixture
def overrides(tiny_overrides: list[str], masked_rows: list[str]) -> list[str]:
    replaced = ("data.synthetic_rows", "data.sources", "model.vocab_size")
    kept = [item for item in tiny_overrides if not item.startswith(replaced)]
    return [*kept, *masked_rows, "model.num_layers=5", *BASE, "backend.options.threads=1"]


@pytest.fixture
def single(overrides: list[str]) -> tuple[State, list[float]]:
    """What the local backend makes of the same recipe, in one process."""
    file = load_recipe("crystal_demo", [*overrides, "backend.name=local"])
    backend, options = backend_options(file)
    run = backend.prepare(Job(file.recipe, Plan(0, 6), options))
    source, _ = open_data(file.recipe)
    results = list(run.train(source))
    assert all(0 < result.bearing_tokens < result.tokens for result in results)
    return run.export_state(), [float(result.loss) for result in results]


def assert_same_as(single: tuple[State, list[float]], folder: Path) -> None:
    state, _ = checkpoint.load(folder / "checkpoints" / "step_00000006")
    assert [record["loss"] for record in read_metrics(folder) if record["kind"] == "step"] == single[1]
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in single[0].tensors.items())


STORES = [
    (2, "central", "ram"),
    (2, "sharded", "direct"),
    (2, "central", "direct"),
    (2, "sharded", "ram"),
    (4, "central", "ram"),
    (4, "sharded", "direct"),
    (2, "sharded", "mapped"),
]


@pytest.mark.prove
@pytest.mark.parametrize(("replicas", "fabric", "tier"), STORES)
def test_the_bits_of_one_process(
    replicas: int, fabric: str, tier: str, overrides: list[str], single: tuple[State, list[float]], tmp_path: Path
) -> None:
    options = [f"backend.options.fabric={fabric}", f"backend.options.tier={tier}", f"batch.replicas={replicas}"]
    others = [command("replica", str(tmp_path / "run")) for _ in range(replicas - 1)]
    with started(
        train(tmp_path, "run", [*overrides, *options, "backend.options.tile_elements=4096"]), *others
    ) as processes:
        for process in processes:
            finished(process)
    assert_same_as(single, tmp_path / "run")


SHARDED = ["batch.replicas=2", "backend.options.fabric=sharded", "backend.options.tile_elements=4096"]


@pytest.mark.prove
def test_a_sharded_store_is_continued(overrides: list[str], single: tuple[State, list[float]], tmp_path: Path) -> None:
    """Both ranks end after three steps, and both go on from their stores."""
    first = [item for item in overrides if not item.startswith("schedule.steps=")] + ["schedule.steps=3"]
    options = [*SHARDED, "backend.options.tier=mapped"]
    for steps, allow in ((first, []), (overrides, ["--allow", "schedule.steps"])):
        with started(
            train(tmp_path, "run", [*steps, *options, *allow]), command("replica", str(tmp_path / "run"))
        ) as processes:
            outputs = [finished(process) for process in processes]
    assert "stands at 3 completed steps: the run goes on from there" in outputs[0]
    assert_same_as(single, tmp_path / "run")


@pytest.mark.prove
@pytest.mark.parametrize("tier", [pytest.param("mapped", marks=pytest.mark.soak), "direct"])
def test_a_sharded_run_is_killed_and_goes_on(tier: str, overrides: list[str], tmp_path: Path) -> None:
    """All ranks die at random moments, also with some of the tiles updated on one and others on the other."""
    steps, randomness = 60, random.Random(tier)
    long = [item for item in overrides if not item.startswith("schedule.steps=")] + [f"schedule.steps={steps}"]
    options = [*SHARDED, f"backend.options.tier={tier}", "batch.global_batch_size=2"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    both = (train(tmp_path, "run", [*long, *options]), command("replica", str(tmp_path / "run")))
    for kills in range(4):
        with started(*both) as (leader, replica):
            logged = metrics.read_text().count('"kind": "step"') if kills else 0
            wait_for(
                lambda before=logged: metrics.exists() and metrics.read_text().count('"kind": "step"') > before + 3,
                leader,
            )
            time.sleep(randomness.uniform(0, 0.03))
            for process in randomness.sample([leader, replica], 2):
                process.kill()
    with started(*both) as processes:
        for process in processes:
            finished(process)
    alone = [*long, "batch.global_batch_size=2"]
    with started(train(tmp_path, "alone", alone, "local")) as (process,):
        finished(process)
    line, same = compare(tmp_path / "run", tmp_path / "alone")
    assert same, line


@pytest.mark.prove
def test_replicas_join_and_leave_between_steps(
    overrides: list[str], single: tuple[State, list[float]], tmp_path: Path
) -> None:
    """One is there from the start and leaves, another joins while it trains; no bit changes."""
    long = [item for item in overrides if not item.startswith("schedule.steps=")] + ["schedule.steps=400"]
    short = tmp_path / "run" / "metrics.jsonl"
    with started(train(tmp_path, "run", [*long, "batch.replicas=2"]), command("replica", str(tmp_path / "run"))) as (
        leader,
        first,
    ):
        wait_for(lambda: short.exists() and short.read_text().count('"kind": "step"') > 5, leader)
        with started(command("replica", str(tmp_path / "run"))) as (second,):
            first.send_signal(signal.SIGTERM)
            assert "left the run" in first.communicate(timeout=60)[0]
            output = finished(leader)
            assert "the run ended" in finished(second)
    assert "400 steps" in output
    losses = [record["loss"] for record in read_metrics(tmp_path / "run") if record["kind"] == "step"]
    assert losses[:6] == single[1]


@pytest.mark.prove
def test_a_killed_replica_is_reported_and_the_last_step_is_intact(overrides: list[str], tmp_path: Path) -> None:
    long = [item for item in overrides if not item.startswith("schedule.steps=")] + ["schedule.steps=1000"]
    options = ["batch.replicas=2", "backend.options.tier=mapped"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with started(train(tmp_path, "run", [*long, *options]), command("replica", str(tmp_path / "run"))) as (
        leader,
        replica,
    ):
        wait_for(lambda: metrics.exists() and metrics.read_text().count('"kind": "step"') > 5, leader)
        replica.kill()
        output, _ = leader.communicate(timeout=60)
    assert leader.returncode != 0
    assert "a replica failed" in output
    assert "the last completed step is intact" in output
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if record["kind"] == "step"]
    stopped = [item if item != "batch.replicas=2" else "batch.replicas=1" for item in options]
    again = [
        *long[:-1],
        f"schedule.steps={steps[-1] + 3}",
        *stopped,
        "--allow",
        "schedule.steps",
        "--allow",
        "batch.replicas",
    ]
    with started(train(tmp_path, "run", again)) as (alone,):
        assert f"stands at {steps[-1]} completed steps" in finished(alone)


def test_a_replica_without_a_run_says_so(tmp_path: Path) -> None:
    with started(command("replica", str(tmp_path / "nowhere"), "--wait", "0")) as (process,):
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "no run there" in output


def test_contiguous_shares_of_any_number_of_ranks() -> None:
    alone = Communicator()
    for count in range(1, 20):
        for size in range(1, count + 1):
            shares = []
            for rank in range(size):
                alone.rank, alone.size = rank, size
                shares.append(list(alone.micro_batches(count)))
            assert [number for share in shares for number in share] == list(range(count))
            assert all(shares)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
