"""The recipe's `evaluations` as evaluators of `fit` (core/evaluators.py), and their lines of kind `score`.

Tasks of lm-eval are computed by the first process from exported weights, in fp32 on its CPU, as texts are; each leaves
a record (records.py) named by the hash of the weights, so what a killed run had computed is not computed again. The
loss on datasets is the backend's own forward pass. The scores of a process on the side arrive as its records.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weftrain.analysis.evaluation.generation import Generator, load_model
from weftrain.analysis.evaluation.records import (
    FOLDER,
    EvaluatedCheckpoint,
    EvaluationRecord,
    EvaluationSettings,
    read_record,
)
from weftrain.analysis.evaluation.tasks import PRESETS, TaskRequest, TaskSuite
from weftrain.analysis.evaluation.tokenizer import end_of_text_id, open_tokenizer
from weftrain.core.backend import Plan, Run, WaitedFor
from weftrain.core.checkpoint import Weights
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError, NonFiniteError, RunInUseError, one_line
from weftrain.core.evaluations_section import EvaluationConfig
from weftrain.core.evaluators import MetricsRecord
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.formats.dataset import TOKENIZER, read_dataset_manifest
from weftrain.core.formats.reference_file import read_reference
from weftrain.core.formats.tokenizer_file import panics_refused
from weftrain.core.model import Decoder
from weftrain.core.order.data_section import SourceConfig
from weftrain.core.order.source_sets import HeldOut, open_set
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.metrics import MetricsWriter
from weftrain.core.run.run_folder import held_run
from weftrain.core.run.scores import SCORE, ScoreBook

_WORD_S = 5.0  # between two words to the ranks that wait

Stopped = Callable[[], bool]


class _StopError(Exception):
    """The run was asked to stop while tasks were being computed."""


def requests_of(evaluation: EvaluationConfig) -> list[TaskRequest]:
    """The tasks that it names, itself or by a preset."""
    preset = () if evaluation.preset is None else PRESETS[evaluation.preset]
    return [*preset, *(TaskRequest(name, evaluation.shots) for name in evaluation.tasks)]


def settings_of(evaluation: EvaluationConfig, **more: Any) -> EvaluationSettings:
    include = None if evaluation.include is None else Path(evaluation.include)
    limit, name = evaluation.limit, evaluation.name
    return EvaluationSettings(evaluation.batch_size, limit=limit, include=include, evaluation=name, **more)


def score_line(name: str, record: EvaluationRecord) -> dict[str, Any]:
    """The line of kind `score` of an evaluation's record. name: the evaluation's."""
    found = {
        "kind": SCORE,
        "step": record["step"],
        "set": f"{name}/{record['task'].removeprefix('heldout/')}",
        "metric": record["metric"],
        "value": record["value"],
        "stderr": record["stderr"],
        "metrics": {metric: one["value"] for metric, one in record["metrics"].items()},
        "samples": record["samples"],
        "record": record["root"],
        "checkpoint": record["checkpoint"],
        "weights_sha256": record.get("weights_sha256"),
    }
    return {key: value for key, value in found.items() if value is not None}


class _Due:
    """When an evaluation on the training processes is due. sets: those that it gives scores of."""

    def __init__(self, evaluation: EvaluationConfig, sets: Sequence[str]) -> None:
        self._every, self._sets = evaluation.every_steps, sets

    def is_due(self, plan: Plan, completed: int) -> bool:
        return plan.wants_every(self._every, completed)

    def is_due_at_start(self, plan: Plan, scored: Set[str]) -> bool:
        """Also where the process before ended before it had all of them."""
        due = plan.wants_every(self._every, plan.start_step) if plan.start_step else plan.evaluate_at_start
        return due and not scored >= set(self._sets)


class TaskScores(_Due):
    """Tasks of lm-eval on the training processes. Raises DataError, before anything is trained, for a task or its data
    that cannot be loaded, and data without a tokenizer.

    run: the run's folder. stopped: whether the run is asked to stop, which ends the computation.
    """

    def __init__(self, evaluation: EvaluationConfig, recipe: Recipe, run: Path, stopped: Stopped) -> None:
        self._key = f"evaluations '{evaluation.name}'"
        self._lora = recipe.tuning.lora
        self._name, self._model, self._folder, self._stopped = evaluation.name, recipe.model, run / FOLDER, stopped
        self._settings = settings_of(evaluation)
        self._open_tokenizer(recipe)
        self._suite = TaskSuite(requests_of(evaluation), self._settings, quiet=True)
        try:
            names = self._suite.load()
        except DataError as error:
            raise DataError(f"{self._key}: {error}") from error
        super().__init__(evaluation, [f"{evaluation.name}/{name}" for name in names])

    def _open_tokenizer(self, recipe: Recipe) -> None:
        folder = Path(recipe.data.root) / recipe.data.sources[0].path if recipe.data.sources else None
        if folder is None or not (folder / TOKENIZER).exists():
            which = "data.synthetic_rows are random rows" if folder is None else str(folder)
            raise DataError(
                f"{self._key}: {which} without a {TOKENIZER}, and tasks are text: name datasets instead, or leave the "
                "evaluation out"
            )
        manifest, file = read_dataset_manifest(folder), folder / TOKENIZER
        self._file = str(file)
        self._tokenizer, self._tokenizer_sha256 = open_tokenizer(file, self._model.vocab_size, (folder, manifest))
        self._eos_id = end_of_text_id(self._tokenizer, file, manifest)

    def measure(self, run: Run, completed: int) -> Iterator[MetricsRecord]:
        """A line for each task; none for those that a request to stop came before."""
        decoder = load_model(Weights(run.export_state().tensors, self._lora), self._model)
        subject = EvaluatedCheckpoint(None, completed, self._tokenizer_sha256, weights_sha256(decoder))
        words = _Words(run, self._name, self._stopped)
        done = 0
        try:
            with _own_random_numbers(), panics_refused(self._file):
                for record in self._suite.records(subject, lambda: self._lm(decoder, words), self._folder, words.say):
                    done += 1
                    yield score_line(self._name, record)
        except (DataError, NonFiniteError, OSError) as error:  # a run does not end for a score
            for name in self._sets[done:]:
                problem = {"metric": "", "value": math.nan, "metrics": {}, "samples": 0, "problem": one_line(error)}
                yield {"kind": SCORE, "step": completed, "set": name, **problem}
        except _StopError:
            return

    def _lm(self, decoder: Decoder, words: _Words) -> Any:
        from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

        return CheckpointLM(
            Generator(decoder),
            self._tokenizer,
            self._eos_id,
            self._model.max_position_embeddings,
            batch_size=self._settings.batch_size,
            seed=self._settings.seed,
            report=words.progress,
        )


class _Words:
    """What a computation says while it goes on: to the ranks that wait for it, and to nobody else."""

    def __init__(self, run: Run, name: str, stopped: Stopped) -> None:
        self._run, self._name, self._stopped, self._said_at = run, name, stopped, time.monotonic()

    def say(self, line: str) -> None:
        pass

    def progress(self, done: int, total: int, what: str) -> None:
        """Raises _StopError if the run is asked to stop."""
        if self._stopped():
            raise _StopError
        now = time.monotonic()
        if isinstance(self._run, WaitedFor) and now - self._said_at >= _WORD_S:
            self._said_at = now
            self._run.keep_waiting(f"evaluate {self._name}: {done} of {total} {what}")


def open_datasets(evaluation: EvaluationConfig, recipe: Recipe) -> list[HeldOut]:
    """The held-out rows of its datasets. Raises DataError for those that do not fit the recipe."""
    found, data, name = [], recipe.data, recipe.objective.reference
    for path in evaluation.datasets:
        source = SourceConfig(name=path, path=path, weight=1.0)
        try:
            shards = open_set(data, source, "heldout", None, recipe.model.vocab_size)
        except DataError as error:
            raise DataError(f"evaluations '{evaluation.name}': {error}") from error
        if shards is None:
            raise DataError(
                f"evaluations '{evaluation.name}': {Path(data.root) / path} has no held-out rows: prepare it with "
                "--heldout-fraction above 0, or leave it out"
            )
        rows = shards.num_rows if evaluation.limit is None else min(evaluation.limit, shards.num_rows)
        reference = None if name is None else read_reference(shards.folder, name, shards.manifest)
        count = rows * data.pieces
        found.append(HeldOut(path, shards, count, data.document_attention, reference, data.pieces))
    return found


class DatasetScores(_Due):
    """Loss, and perplexity or the objective's measures, on the held-out rows of datasets, by the backend's own forward
    pass. Raises DataError.
    """

    def __init__(self, evaluation: EvaluationConfig, recipe: Recipe, stopped: Stopped) -> None:
        self._sources, self._stopped = open_datasets(evaluation, recipe), stopped
        super().__init__(evaluation, [f"{evaluation.name}/{source.name}" for source in self._sources])

    def measure(self, run: Run, completed: int) -> Iterator[MetricsRecord]:
        for name, source in zip(self._sets, self._sources, strict=True):
            if self._stopped():
                return
            result = run.evaluate(source)
            yield {
                "kind": SCORE,
                "step": completed,
                "set": name,
                "metric": "loss",
                "value": result.loss,
                "metrics": {"loss": result.loss, **result.beside_loss},
                "samples": source.num_rows,
                "tokens": result.tokens,
                "dataset_id": source.dataset_id,
            }


class SideScores:
    """Scores that a process on the side has recorded of the run's checkpoints since the last look."""

    def __init__(self, run: Path, names: Sequence[str]) -> None:
        self._folder, self._names, self._seen = run / FOLDER, frozenset(names), set[str]()

    def is_due(self, plan: Plan, completed: int) -> bool:
        return plan.wants_log(completed) or plan.wants_state(completed)

    def is_due_at_start(self, plan: Plan, scored: Set[str]) -> bool:
        return True

    def measure(self, run: Run, completed: int) -> Iterator[MetricsRecord]:
        yield from self.new()

    def new(self) -> Iterator[MetricsRecord]:
        """Their lines. A damaged record is left out: the process on the side makes it again."""
        try:
            names = sorted(path.name for path in self._folder.iterdir() if path.suffix == ".json")
        except FileNotFoundError:
            return
        for name in names:
            if name in self._seen:
                continue
            try:
                record = read_record(self._folder / name)
            except DataError:
                continue
            self._seen.add(name)
            if record.get("evaluation") in self._names and record["checkpoint"] is not None:
                yield score_line(record["evaluation"], record)


def enter_side_scores(run: Path, names: Sequence[str]) -> int | None:
    """Enter in metrics and ledger what they lack of the scores of a run that has ended; how many. None: it is in use.

    names: of the evaluations on the side. Raises RunFolderError.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held_run(run))
        except RunInUseError:
            return None
        metrics = stack.enter_context(MetricsWriter(run, begins=False))
        book = ScoreBook(metrics, Ledger(run))
        return sum(book.enter({**line, "evaluation_s": 0.0}) for line in SideScores(run, names).new())


def weights_sha256(decoder: Decoder) -> str:
    """Over the hashes of a model's fp32 parameters by name, which a checkpoint's manifest states too."""
    found = {}
    for name, parameter in decoder.named_parameters():
        data = parameter.detach().contiguous().view(torch.uint8).numpy()
        found[name] = hashlib.sha256(data.data).hexdigest()
    return sha256_json(found)


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """What lm-eval seeds and draws in this block is not seen outside it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
