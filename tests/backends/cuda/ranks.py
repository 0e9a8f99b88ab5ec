"""Ranks for tests: this process leads, and others, started once for many runs, follow. Runs on them and in one process.

Run as a program, in a process forked from one that has imported what it needs, it is one of the others.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weftrain.backends.common.registry import get_backend
from weftrain.backends.cuda import BACKEND
from weftrain.backends.cuda.degrees import degrees, ranks_per_node
from weftrain.backends.cuda.engine import CudaRun
from weftrain.backends.cuda.memory_copies import find, layout_of, run_folder
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.rendezvous import leave, rendezvous
from weftrain.core.backend import Job, Plan, Run, State
from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.initialization import draw
from weftrain.core.order.batch import Batch, BatchSource
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.parameters import parameter_specs
from weftrain.core.recipe_file import load_recipe

PATIENCE_S = 120  # that this process waits for another rank
IDLE_S = 3600  # that another rank waits for this one, which may do something else between two runs


@dataclass(frozen=True)
class MaskedSource:
    """Synthetic rows of which each has its own number of tokens that bear a loss, its last ones. bearing: of each row,
    in order.
    """

    source: BatchSource
    bearing: tuple[int, ...]
    has_extras: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def rows(self, step: int, first: int, count: int) -> Batch:
        start, length = step * self.source.global_batch_size + first, self.source.sequence_length
        counts = self.bearings(np.arange(start, start + count))
        mask = np.arange(length) >= length - counts[:, None]
        batch = Batch(self.source.rows(step, first, count).ids, mask)
        return replace(batch, **self.extras(np.arange(start, start + count))) if self.has_extras else batch

    def extras(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Weights of tokens, and log-probabilities of a reference, as functions of the row's number."""
        weights = 0.5 + np.outer(rows % 5 + 1, np.arange(self.source.sequence_length) % 3).astype(np.float32) / 4
        return {"token_weights": weights, "reference": -4.0 * self.bearings(rows) + np.sin(rows)}

    def bearings(self, rows: np.ndarray) -> np.ndarray:
        return np.array([self.bearing[row % len(self.bearing)] for row in rows])


# By the recipe's name, which other processes are told. Batches of 4 rows, then micro-batches without any bearing token.
BEARING = {"masked": (13, 3, 0, 5, 0, 0, 1, 0, 7, 0, 13, 2), "empty": (13, 3, 0, 5, 0, 0, 0, 0, 7, 0, 13, 2)}
BEARING["pairs"] = (13, 3, 4, 5, 1, 12, 13, 13)


def source_of(recipe: Recipe) -> BatchSource:
    """The rows that every test of the conformance suite trains on: made up, or of the recipe's dataset."""
    if (rows := recipe.data.synthetic_rows) is None:
        return training_source(recipe)
    source = synthetic_source(
        recipe.model.vocab_size, recipe.data.sequence_length, rows, recipe.batch.global_batch_size, seed=5
    )
    if recipe.name not in BEARING:
        return source
    return MaskedSource(source, BEARING[recipe.name], has_extras=bool(recipe.objective.features))


LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "fsdp_no_reshard": {"reshard_after_forward": False},
    "fsdp_every_micro_batch": {"reduce_every_micro_batch": True},
    "hsdp": {"parallel": "hsdp", "shard_group": 2},
    "ddp": {"parallel": "ddp"},
    "tensor_2": {"tensor_parallel": 2},
    "tensor_4": {"tensor_parallel": 4},
    "context_2": {"context_parallel": 2},
    "context_4": {"context_parallel": 4},
    "tensor_2_context_2": {"tensor_parallel": 2, "context_parallel": 2},
    "hsdp_tensor_2": {"parallel": "hsdp", "shard_group": 1, "tensor_parallel": 2},
    "selective": {"activation_checkpointing": "selective"},
    "full_tensor_2": {"activation_checkpointing": "full", "tensor_parallel": 2},
    "offload": {"cpu_offload": True},
}
# of models with experts alone
PIPELINED_EXPERTS: dict[str, dict[str, Any]] = {
    "pipeline_2": {"pipeline_parallel": 2},
    "pipeline_2_expert_2": {"pipeline_parallel": 2, "expert_parallel": 2, "activation_checkpointing": "full"},
    "pipeline_4_gpipe": {"pipeline_parallel": 4, "pipeline_schedule": "gpipe"},
    "pipeline_2_tensor_2_expert_2": {"pipeline_parallel": 2, "tensor_parallel": 2, "expert_parallel": 2},
    "pipeline_2_interleaved_ddp": {
        "pipeline_parallel": 2,
        "pipeline_schedule": "interleaved_1f1b",
        "pipeline_virtual_stages": 2,
        "parallel": "ddp",
    },
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "expert_2": {"expert_parallel": 2},
    "expert_4": {"expert_parallel": 4},
    "hsdp_expert_2": {"parallel": "hsdp", "shard_group": 2, "expert_parallel": 2, "activation_checkpointing": "full"},
    "tensor_2_expert_4": {"tensor_parallel": 2, "expert_parallel": 4},
    "context_2_expert_2": {"context_parallel": 2, "expert_parallel": 2, "activation_checkpointing": "selective"},
    "tensor_2_context_2_expert_2": {"tensor_parallel": 2, "context_parallel": 2, "expert_parallel": 2},
    "hsdp_tensor_2_expert_2": {"parallel": "hsdp", "shard_group": 1, "tensor_parallel": 2, "expert_parallel": 2},
}


def on_ranks(
    recipe: Recipe,
    weights: dict[str, torch.Tensor] | None = None,
    start: int = 0,
    time_phases: bool = False,
    **options: Any,
) -> CudaRun:
    """start: go on from the copies of that step in memory."""
    if Others.current is not None:
        Others.current.check()
    degrees_given = (options.get(f"{name}_parallel", 1) for name in ("tensor", "context", "pipeline"))
    data = 4 // math.prod(degrees_given)
    each = recipe.batch.global_batch_size // data
    batch = {"replicas": data, "micro_batch_size": min(recipe.batch.micro_batch_size, each)}
    backend = {"name": "cuda", "options": {"device": "cpu", **options}}
    recipe = Recipe.model_validate(
        {**recipe.model_dump(), "batch": {**recipe.batch.model_dump(), **batch}, "backend": backend}
    )
    checked = CudaOptions.model_validate(recipe.backend.options)
    if start:
        world = rendezvous("cpu", PATIENCE_S)
        shape = degrees(checked, recipe, 4, ranks_per_node(4))
        where, layout = run_folder(checked, Path()), layout_of(recipe.model, shape, checked.parallel)
        world.command(do="find", folder=str(where), layout=layout)
        world.copies, _ = find(world, where, layout)
    return BACKEND.prepare(Job(recipe, Plan(start, recipe.schedule.steps), checked, weights, time_phases=time_phases))


def alone(recipe: Recipe, weights: dict[str, torch.Tensor] | None = None) -> Run:
    local = get_backend("local")
    return local.prepare(Job(recipe, Plan(0, recipe.schedule.steps), local.options(), weights))


def larger_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Than at initialisation, so that every part of the model moves the loss."""
    return {
        spec.name: draw(spec, recipe.model, 3) * (2.0 if len(spec.shape) > 1 else 1.0)
        for spec in parameter_specs(recipe.model)
    }


def started(recipe: Recipe) -> State:
    weights = larger_weights(recipe)
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    for plane in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{plane}/{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    return State(0, 0, tensors)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    wanted = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in wanted.items()}


# Importing what a rank needs takes seconds, so it is done once, by a process that is then forked for each rank.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["weftrain.backends.cuda.engine", "weftrain.backends.local"])


class Process:
    """A rank above 0, forked. It has this process's folder, `variables` and nothing else as its environment, and writes
    to `output`.
    """

    def __init__(self, variables: dict[str, str], output: Path) -> None:
        given = {"GIVEN": (os.getcwd(), variables, str(output))}
        self._process = _SERVER.Process(target=runpy.run_path, args=(__file__, given, "__main__"), daemon=True)
        self._process.start()
        self.pid, self.kill = self._process.pid or 0, self._process.kill

    def poll(self) -> int | None:
        """Its exit status, negative where a signal ended it, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.poll()


class Others:
    """The ranks above 0, processes of their own. When one of them ends before it is told to, its stderr is shown and the
    rest are killed, so that this process does not wait for any of them: the test fails at once, and those after it.
    spares: the rest are not killed, for a test of how they end.
    """

    current: Others | None = None

    def __init__(self, size: int, port: int, folder: Path) -> None:
        self.spares = False
        self._output = [folder / f"rank-{rank}.txt" for rank in range(1, size)]
        self._ends, self._lost = threading.Event(), ""
        self.processes = []
        for rank, file in enumerate(self._output, 1):
            file.touch()
            self.processes.append(Process({**os.environ, **environment(rank, size, port)}, file))
        self._watch = threading.Thread(target=self._run, daemon=True)
        self._watch.start()

    def _run(self) -> None:
        while not self._ends.wait(0.05):
            for rank, process in enumerate(self.processes, 1):
                if process.poll() is not None:
                    told = self._output[rank - 1].read_text()[-4000:]
                    self._lost = f"rank {rank} ended with status {process.poll()}:\n{told}"
                    sys.stderr.write(self._lost)
                    for other in () if self.spares else self.processes:
                        other.kill()
                    return

    def said(self, rank: int) -> str:
        return self._output[rank - 1].read_text()

    def check(self) -> None:
        """Fail if a rank has been lost."""
        assert not self._lost, self._lost

    def end(self, regularly: bool) -> None:
        """regularly: they were told to end, and are waited for."""
        self._ends.set()
        self._watch.join()
        try:
            for process in self.processes if regularly else ():
                process.wait(timeout=PATIENCE_S)
        finally:
            for process in self.processes:
                process.kill()
                process.wait()


@contextlib.contextmanager
def world_of(size: int) -> Iterator[None]:
    """While it lasts, runs of the cuda backend that are prepared here are runs of `size` ranks; several may be, one
    after another.
    """
    port, before, regularly = free_port(), dict(os.environ), False
    with tempfile.TemporaryDirectory() as folder:
        others = Others.current = Others(size, port, Path(folder))
        try:
            os.environ.update(environment(0, size, port))
            leave()
            torch.set_num_threads(1)
            rendezvous("cpu", PATIENCE_S)
            yield
            others.check()
            rendezvous("cpu", PATIENCE_S).command(do="end")
            regularly = True
        finally:
            Others.current = None
            others.end(regularly)
            leave()
            os.environ.clear()
            os.environ.update(before)


def main() -> None:
    from faults import planted

    recipe = load_recipe("crystal_demo", ["data.sources=[]", "data.synthetic_rows=4"]).recipe
    job = Job(recipe, Plan(0, 1), BACKEND.options(device="cpu", timeout_s=IDLE_S, threads=1), folder=None)
    with planted():
        BACKEND.run_worker(lambda: job, lambda job: source_of(job.recipe), 60)


def become(folder: str, variables: dict[str, str], output: str) -> None:
    """Let this process, a fork, be as one that was started with them."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)


if __name__ == "__main__":
    become(*globals()["GIVEN"])
    sys.path.insert(0, str(Path(__file__).parent))
    main()
