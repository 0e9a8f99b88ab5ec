"""Runs of several processes, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from known_peak import PROGRAM

from weftrain.cli.assembly import open_data
from weftrain.cli.resolve import backend_options
from weftrain.core import checkpoint
from weftrain.core.backend import Job, Plan, State
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.metrics import read_metrics
from weftrain.core.stop import StopRequest

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
    return [*PROGRAM, *arguments]


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


def alone(overrides: list[str]) -> tuple[State, list[float]]:
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


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def asked() -> StopRequest:
    stop = StopRequest()
    stop.ask(signal.SIGTERM)
    return stop
