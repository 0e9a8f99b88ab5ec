"""The result log of MLPerf Training's `llama31_8b` (v5.1, v6.0 and v6.1), from the record of a finished run.

`result_lines` gives the `:::MLLOG` lines that mlcommons/logging's compliance checker asks for, key by key. Times are
those that the run recorded in metrics.jsonl, so the trainer knows nothing of the benchmark. A run that was continued,
or whose recipe has other than the benchmark's numbers, is refused or fails the checker: nothing here is made up.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.config import Recipe, Segment
from weftrain.core.errors import WeftrainError
from weftrain.core.run.metrics import read_metrics
from weftrain.core.run.run_folder import stored_recipe
from weftrain.core.trainer import at_target

BENCHMARK = "llama31_8b"
RECIPE_YAML = "recipe.yaml"  # in the run's folder


class MlperfError(WeftrainError):
    """A run of which no result log can be written."""


@dataclass(frozen=True)
class Submission:
    """What a run does not know of itself: who submits it, and as what."""

    org: str
    platform: str
    division: str = "closed"  # closed or open
    caches_cleared: bool = False  # whether the system's caches were cleared before the run


def result_lines(run: Path, submission: Submission) -> list[str]:
    """The lines of the result log of the run in a folder. Raises MlperfError, RunFolderError."""
    stored = stored_recipe(run)
    assert stored is not None  # missing_ok was not given
    recipe, records = Recipe.from_record(stored), read_metrics(run)
    starts = [one for one in records if one["kind"] in ("start", "resume")]
    if [one["kind"] for one in starts] != ["start"] or starts[0]["step"] != 0:
        raise MlperfError(f"{run}: MLPerf measures one uninterrupted run, and this one has {len(starts)} starts")
    blocks = _blocks(run, records)
    return list(_lines(recipe, submission, starts[0], records, blocks))


def _blocks(run: Path, records: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Each evaluation, with the time at which it began: that of the line before it, which its step wrote."""
    found = [
        (before["time"], record) for before, record in itertools.pairwise(records) if record["kind"] == "evaluation"
    ]
    if not found:
        raise MlperfError(f"{run}: no evaluation is recorded: set log.evaluate_every_steps, and prepare a held-out set")
    if len({record["set"] for _, record in found}) > 1:
        raise MlperfError(f"{run}: MLPerf evaluates one held-out set: {', '.join({one['set'] for _, one in found})}")
    return found


def _lines(
    recipe: Recipe,
    submission: Submission,
    start: dict[str, Any],
    records: Sequence[dict[str, Any]],
    blocks: Sequence[tuple[float, dict[str, Any]]],
) -> Iterator[str]:
    batch, began = recipe.batch.global_batch_size, start["time"]
    prepared = began - start.get("preparation_s", 0.0)
    if submission.caches_cleared:
        yield _line(prepared, "cache_clear", True)
    yield _line(prepared, "init_start", None, "INTERVAL_START")
    for key, value in _settings(recipe, submission, blocks[0][1]):
        yield _line(began, key, value)
    yield _line(began, "init_stop", None, "INTERVAL_END")
    yield _line(began, "run_start", None, "INTERVAL_START")
    yield _line(began, "block_start", None, "INTERVAL_START", samples_count=0)
    done, reached, ended = 0, False, began
    for number, (from_s, record) in enumerate(blocks):
        done, ended = record["step"] * batch, record["time"]
        reached = at_target(recipe, [record])
        yield _line(from_s, "block_stop", None, "INTERVAL_END", samples_count=done)
        yield _line(from_s, "eval_start", None, "INTERVAL_START", samples_count=done)
        yield _line(ended, "eval_accuracy", record["loss"], samples_count=done)
        yield _line(ended, "eval_stop", None, "INTERVAL_END", samples_count=done)
        if number + 1 < len(blocks):
            yield _line(ended, "block_start", None, "INTERVAL_START", samples_count=done)
    ended = ended if reached else records[-1]["time"]
    yield _line(ended, "run_stop", None, "INTERVAL_END", status="success" if reached else "aborted")
    yield _line(ended, "train_samples", done)


def _settings(recipe: Recipe, submission: Submission, evaluation: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    warm_up, decay = _schedule(recipe)
    optimizer = recipe.optimizer
    yield "submission_benchmark", BENCHMARK
    yield "submission_org", submission.org
    yield "submission_division", submission.division
    yield "submission_status", "onprem"
    yield "submission_platform", submission.platform
    yield "seed", recipe.seed
    yield "global_batch_size", recipe.batch.global_batch_size
    yield "micro_batch_size", recipe.batch.micro_batch_size
    yield "gradient_accumulation_steps", recipe.batch.accumulation_steps
    yield "max_sequence_length", recipe.data.sequence_length
    yield "eval_samples", evaluation["rows"]
    yield "max_steps", recipe.schedule.steps
    yield "opt_name", optimizer.name
    yield "opt_base_learning_rate", decay.start
    yield "opt_end_learning_rate", decay.end
    yield "opt_learning_rate_warmup_steps", warm_up.steps
    yield "opt_learning_rate_decay_steps", decay.steps
    yield "opt_learning_rate_decay_schedule", "cosine with linear warmup"
    yield "opt_adamw_beta_1", optimizer.beta1
    yield "opt_adamw_beta_2", optimizer.beta2
    yield "opt_adamw_epsilon", optimizer.eps
    yield "opt_adamw_weight_decay", optimizer.weight_decay
    yield "opt_gradient_clip_norm", optimizer.clip_norm
    yield from _disclosures(recipe)


def _disclosures(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """What v6.1 asks for besides: precisions, degrees of parallelism, and the file of the configuration."""
    options = recipe.backend.options
    compute = {"bfloat16": "bfloat16", "float32": "fp32"}[recipe.precision.compute]
    yield (
        "lowest_numerical_precision_in_linear",
        "fp8" if options.get("float8", False) not in (False, "none") else compute,
    )
    yield "lowest_numerical_precision_in_attn", compute
    # weights are gathered in the compute dtype, gradients reduced in that of the option
    yield "lowest_numerical_precision_in_comm", "bfloat16" if options.get("reduce") == "bfloat16" else compute
    yield "tensor_parallelism", options.get("tensor_parallel", 1)
    yield "pipeline_parallelism", options.get("pipeline_parallel", 1)
    yield "context_parallelism", options.get("context_parallel", 1)
    yield "expert_parallelism", options.get("expert_parallel", 1)
    yield "config_filename", RECIPE_YAML


def _schedule(recipe: Recipe) -> tuple[Segment, Segment]:
    """The warm-up and the cosine, which is all that the benchmark's schedule has."""
    shapes = [(one.shape, one.start == 0) for one in recipe.schedule.learning_rate]
    if shapes != [("linear", True), ("cosine", False)]:
        raise MlperfError("schedule.learning_rate: MLPerf's is a linear warm-up from 0 and a cosine, and nothing else")
    warm_up, decay = recipe.schedule.learning_rate
    return warm_up, decay


def _line(time_s: float, key: str, value: Any, kind: str = "POINT_IN_TIME", **metadata: Any) -> str:
    entry = {"namespace": "", "time_ms": int(time_s * 1000), "event_type": kind, "key": key, "value": value}
    return ":::MLLOG " + json.dumps(entry | {"metadata": metadata})
