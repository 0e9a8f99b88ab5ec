"""The backend that does nothing: it satisfies the protocol, reads every row and computes nothing.

It tests the core without arithmetic, and measures the data path alone. Its loss is always 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from weftrain.backends.common.base import PlainBackend
from weftrain.backends.common.decoder import initial_planes, state_tensors
from weftrain.core.backend import EvalResult, Fingerprint, Job, State, StepResult
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.batch import Batch, BatchSource, EvaluationSource


class NullOptions(StrictModel):
    """The null backend has no options."""


class NullRun:
    """Holds a state and counts steps."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._groups = parameter_groups(job.recipe.model, job.recipe.optimizer, job.recipe.tuning)
        self._state = State(job.plan.start_step, 0, state_tensors(initial_planes(job, torch.device("cpu"))))

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        recipe, micro = self._job.recipe, self._job.recipe.batch.micro_batch_size
        for step in range(self._state.step, self._job.plan.last_step):
            start = time.perf_counter()
            firsts = range(0, recipe.batch.global_batch_size, micro)
            bearing = sum(source.rows(step, first, micro).bearing_tokens for first in firsts)
            elapsed_ms = (time.perf_counter() - start) * 1e3
            self._state = State(step + 1, self._state.optimizer_updates + 1, self._state.tensors)
            rates = group_learning_rates(self._groups, recipe.schedule, step)
            measures = dict.fromkeys(recipe.objective.measures, 0.0)
            tokens, times = recipe.tokens_per_step, (elapsed_ms, elapsed_ms)
            yield StepResult(step, 0.0, 0.0, rates, tokens, bearing, *times, measures=measures)

    def gradients(self, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        names = (spec.name for spec in self._job.recipe.parameters if spec.trained)
        return 0.0, {name: torch.zeros_like(self._state.tensors[f"weights/{name}"]) for name in names}

    def evaluate(self, source: EvaluationSource) -> EvalResult:
        micro = self._job.recipe.batch.micro_batch_size
        for first in range(0, source.num_rows, micro):
            source.rows(first, min(micro, source.num_rows - first))
        measures = dict.fromkeys(self._job.recipe.objective.measures, 0.0)
        return EvalResult(0.0, source.num_rows * source.sequence_length, measures)

    def export_state(self) -> State:
        return self._state

    def import_state(self, state: State) -> None:
        self._state = State(
            state.step, state.optimizer_updates, {name: tensor.clone() for name, tensor in state.tensors.items()}
        )

    def fingerprint(self) -> Fingerprint:
        return Fingerprint("null", "cpu", "cpu", more={"torch": torch.__version__})

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._state = State(self._state.step, self._state.optimizer_updates, {})


class NullBackend(PlainBackend):
    name = "null"
    summary = "computes nothing: tests the core, measures the data path alone"
    options = NullOptions
    returns_gradients = False
    unsupported = frozenset({"samples"})  # its weights never change

    def prepare(self, job: Job) -> NullRun:
        return NullRun(job)


BACKEND = NullBackend()
