"""The training loop: fit() is the whole of it. It consumes results; the backend drives the steps.

What a reader would get wrong: fit() is a generator. It trains as it is iterated, so whoever draws a progress bar, stops
early or prints a table does so around the `for`, and no callback is needed. Everything that must survive is on disk
before it is yielded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from weftrain.core import checkpoint
from weftrain.core.backend import BatchSource, EvaluationSource, Plan, Run, StepResult
from weftrain.core.config import Recipe
from weftrain.core.errors import NonFiniteError
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.order.timeline import recipe_timeline
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import Digest, MetricsWriter
from weftrain.core.run.skip_limits import SkipLimits
from weftrain.core.run.speed import Speed
from weftrain.core.run.stored_state import Measured, Unfinished, skip_is_entered


@dataclass(frozen=True)
class Progress:
    """What one step left behind. Each part is None where the plan did not ask for it."""

    result: StepResult
    log: dict[str, Any] | None  # the line that went into metrics.jsonl
    evaluations: tuple[dict[str, Any], ...]
    # of this step or, where a backend saves while it trains on, of an earlier one
    saved: checkpoint.CheckpointInfo | None


def fit(
    run: Run,
    plan: Plan,
    recipe: Recipe,
    source: BatchSource,
    heldout: Sequence[EvaluationSource],
    checkpoints: Path,
    metrics: MetricsWriter,
    ledger: Ledger,
    *,
    speed: Speed,
    parent: str | None = None,
    tokens_read: int = 0,
    unfinished: Unfinished | None = None,
    measured: Measured | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Train to plan.last_step, or to the end of the step in which should_stop() becomes true or too many were skipped
    (core/run/skip_limits.py); then the state is saved first.

    parent: root hash of the checkpoint that the run started from. tokens_read: positions that the run read before
    plan.start_step. unfinished: the last step that the backend's own state had completed, where its process ended
    before all of it was recorded: it is recorded first, as if the step had just been made. measured: what was recorded
    since the checkpoint before such a state. Raises NonFiniteError, CheckpointError, DataError.
    """
    tokens, duration_ms = 0, 0.0  # since the last log line
    tokens_read -= 0 if unfinished is None else unfinished.result.tokens
    saves = _Saves(run, plan, recipe, source, checkpoints, metrics, ledger, parent, tokens_read, measured)
    limits = SkipLimits(recipe, plan.start_step - (unfinished is not None), lineage(ledger.entries).skips)
    # otherwise its checkpoint begins the chunk
    if unfinished is None or not unfinished.plan.wants_state(plan.start_step):
        saves.begin_run()
    for result in saves.watched(chain([] if unfinished is None else [unfinished.result], run.train(source))):
        again = unfinished is not None and result is unfinished.result
        made_by, due = (unfinished.recipe, unfinished.plan) if unfinished is not None and again else (recipe, plan)
        completed = result.step + 1
        tokens, duration_ms = tokens + result.tokens, duration_ms + result.step_ms
        saves.tokens_read += result.tokens
        log = None
        if due.wants_log(completed) or result.skipped:
            tokens_per_second = tokens / duration_ms * 1e3 if duration_ms else math.nan
            speed = _allowing(speed, tokens_per_second, completed, metrics)
            log = _step_line(result, saves.tokens_read, tokens_per_second, speed, run.stats())
            metrics.step(log)
            saves.measured.add({"kind": "step", **log})
            tokens, duration_ms = 0, 0.0
        if result.skipped and not (again and skip_is_entered(ledger.entries, completed)):
            first = recipe_timeline(made_by).sample(result.step)
            ledger.add("skip", step=completed, samples=[first, first + made_by.batch.global_batch_size])
        evaluations = (
            tuple(_evaluate(run, held, completed) for held in heldout) if due.wants_evaluation(completed) else ()
        )
        for evaluation in evaluations:
            metrics.evaluation(evaluation)
            saves.measured.add({"kind": "evaluation", **evaluation})
        too_many = limits.exceeded(completed, result.skipped)
        stop = should_stop() or too_many is not None
        if stop or due.wants_state(completed):
            metrics.flush()  # before the checkpoint, so that a resume from it finds every line up to it
            saves.begin(unfinished if again else None)
        yield Progress(result, log, evaluations, saves.finished(wait=stop or completed == plan.last_step))
        if too_many is not None:
            raise NonFiniteError(
                f"step {result.step}: {too_many}: the state after {completed} completed steps is saved; look at the "
                "skipped samples "
                "(`weftrain log` lists them), lower the learning rate, or raise that limit with --allow and go on"
            )
        if stop:
            return


def _allowing(speed: Speed, tokens_per_second: float, completed: int, metrics: MetricsWriter) -> Speed:
    """The speed with a peak that such a step does not exceed; a new peak is recorded before the step's line."""
    found = speed.allowing(tokens_per_second)
    if found is not speed:
        metrics.event("peak", step=completed, **found.as_record())
    return found


def _step_line(
    result: StepResult, tokens_read: int, tokens_per_second: float, speed: Speed, stats: dict[str, float]
) -> dict[str, Any]:
    return {
        "step": result.step + 1,
        "loss": float(result.loss),
        "grad_norm": float(result.grad_norm),
        "learning_rate": dict(result.learning_rates),
        "tokens": tokens_read,
        "bearing_tokens": result.bearing_tokens,  # of this step: what its loss is the mean over
        "tokens_per_second": tokens_per_second,
        "step_ms": result.step_ms,
        "data_wait_ms": result.data_wait_ms,
        "model_flops_utilization": speed.utilization(tokens_per_second),
        "skipped": result.skipped,
        **stats,
    }


def _evaluate(run: Run, held: EvaluationSource, completed: int) -> dict[str, Any]:
    result = run.evaluate(held)
    perplexity = math.exp(result.loss) if result.loss < 700 else math.inf  # exp overflows a double at 709.8
    read = {"rows": held.num_rows, "rows_available": held.rows_available, "dataset_id": held.dataset_id}
    return {
        "step": completed,
        "set": held.name,
        "loss": result.loss,
        "perplexity": perplexity,
        "tokens": result.tokens,
        **read,
    }


class _Saves:
    """One checkpoint after the other: at once, or in a thread where the state no longer depends on the run
    (`Saving.in_background`).
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        recipe: Recipe,
        source: BatchSource,
        folder: Path,
        metrics: MetricsWriter,
        ledger: Ledger,
        parent: str | None,
        tokens_read: int,
        measured: Measured | None,
    ) -> None:
        # since the run began; the sequence length or the batch may have changed at a resume
        self.tokens_read = tokens_read
        self._run, self._plan, self._recipe, self._source, self._folder = run, plan, recipe, source, folder
        self._metrics, self._ledger, self._parent = metrics, ledger, parent
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._under_way: tuple[Future[checkpoint.CheckpointInfo], dict[str, Any]] | None = None
        self._done: checkpoint.CheckpointInfo | None = None
        self._measured_after = plan.start_step if measured is None else measured.after
        self.measured = Digest()  # since the last checkpoint was begun
        for record in () if measured is None else measured.records:
            self.measured.add(record)

    def begin_run(self) -> None:
        """Enter the first chunk. A run of chunks that starts from another run's state keeps that state: the first link
        begins there.
        """
        foreign = (
            self._recipe.start_from is not None and self._recipe.data.chunks is not None and self._plan.start_step == 0
        )
        if foreign and not (self._folder / folder_name(0)).exists():
            self.begin()
            self._take(wait=True)
        else:
            self._ledger.chunk_begin(self._plan.start_step, self._recipe, self._source.dataset_id, self._parent)

    def begin(self, unfinished: Unfinished | None = None) -> None:
        """Start to save the run's state. The checkpoint before is finished first: it is this one's parent. Raises
        CheckpointError.
        """
        self._take(wait=True)
        recipe = self._recipe if unfinished is None else unfinished.recipe
        dataset_id = self._source.dataset_id if unfinished is None else unfinished.dataset_id
        state, fingerprint = self._run.export_state(), self._run.fingerprint()
        cursors = self._source.cursors(state.step) if unfinished is None else unfinished.sources
        saving = checkpoint.begin(
            self._folder,
            state,
            recipe=recipe.model_dump(mode="json"),
            dataset_id=dataset_id,
            fingerprint=fingerprint.as_json(),
            tokens=self.tokens_read,
            position=recipe_timeline(recipe).sample(state.step),
            sources={name: cursor.model_dump(mode="json") for name, cursor in cursors.items()},
            parent=self._parent,
            kernels=dict(fingerprint.kernels),
        )
        made_by = {"recipe": recipe, "dataset_id": dataset_id}
        entry = {
            **made_by,
            "parent": self._parent,
            "metrics_after": self._measured_after,
            "metrics_sha256": self.measured.hexdigest(),
        }
        self._measured_after, self.measured = state.step, Digest()
        if saving.in_background:
            self._under_way = self._threads.submit(saving.finish), entry
        else:
            self._note(saving.finish(), entry)

    def finished(self, wait: bool) -> checkpoint.CheckpointInfo | None:
        """The checkpoint that became durable since the last question. wait: for the one under way. Raises
        CheckpointError.
        """
        self._take(wait)
        done, self._done = self._done, None
        return done

    def watched(self, results: Iterator[StepResult]) -> Iterator[StepResult]:
        """The run's results; however they end, a checkpoint that was begun is finished."""
        try:
            yield from results
        finally:
            self._threads.shutdown(wait=True)
            self._take(wait=True)

    def _take(self, wait: bool) -> None:
        if self._under_way is not None and (wait or self._under_way[0].done()):
            (under_way, entry), self._under_way = self._under_way, None  # a failure is told once
            self._note(under_way.result(), entry)

    def _note(self, saved: checkpoint.CheckpointInfo, entry: dict[str, Any]) -> None:
        self._done, self._parent = saved, saved.root
        self._metrics.event("checkpoint", step=saved.step, root=saved.root)
        self._ledger.checkpoint(step=saved.step, root=saved.root, **entry)
        if saved.step < self._plan.last_step:
            self._ledger.chunk_begin(saved.step, self._recipe, self._source.dataset_id, saved.root)
