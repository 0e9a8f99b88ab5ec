"""The training loop: `fit` is the whole of it. The backend drives the steps; this loop records, evaluates and saves.

`fit` is a generator: it trains as it is iterated, so a caller that draws a progress bar or stops early does so around
its own `for`, without callbacks. Everything that must survive a crash is on disk before a step is yielded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.backend import Plan, Run, StepResult
from weftrain.core.checkpoint import CheckpointInfo
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.evaluators import Evaluator
from weftrain.core.order.batch import BatchSource
from weftrain.core.run.alert_actions import AlertActions, TakenAlert
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import MetricsWriter
from weftrain.core.run.scores import SCORE, ScoreBook
from weftrain.core.run.skip_limits import SkipLimits
from weftrain.core.run.speed import Speed
from weftrain.core.run.stored_state import Unfinished, skip_is_entered
from weftrain.core.saving import History, Saver


@dataclass(frozen=True)
class TrainedStep:
    """A step that is complete and recorded. What the plan did not ask for is None or empty."""

    result: StepResult
    log: dict[str, Any] | None  # the line that went into metrics.jsonl
    measured: tuple[dict[str, Any], ...]  # the lines of its evaluators, and with the first step of those before it
    saved: CheckpointInfo | None  # of this step or, if the backend saves in the background, of an earlier one
    alerts: tuple[TakenAlert, ...] = ()
    problems: tuple[str, ...] = ()  # what went wrong with older checkpoints, a line each; the run goes on


def fit(
    run: Run,
    plan: Plan,
    recipe: Recipe,
    source: BatchSource,
    evaluators: Sequence[Evaluator],
    checkpoints: Path,
    metrics: MetricsWriter,
    ledger: Ledger,
    *,
    speed: Speed,
    history: History = History(),  # noqa: B008 - immutable
    should_stop: Callable[[], bool] = lambda: False,
    should_save: Callable[[], bool] = lambda: False,
    time_to_save: Callable[[float], bool] = lambda needed_s: True,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[TrainedStep]:
    """Train to plan.last_step, or to the end of the step in which should_stop() becomes true, `log.stop_at_loss` is
    reached, or too many were skipped (core/run/skip_limits.py); then the state is saved first.

    The first step is the unfinished one of `history`, if there is one: it is recorded as if it had just been made.
    evaluators: each is asked after each step, and before the first one, whether it is due. should_save: whether
    somebody asked for a checkpoint now, besides those of the plan. time_to_save: asked when should_stop() is true, with
    the seconds that a save takes, as the last one did, after the one under way: if there is not so much left, the run
    stops with the checkpoint before.
    Raises NonFiniteError, CheckpointError, DataError; AlertError and RollbackAsked as the recipe's `alerts` ask.
    """
    first_step = plan.start_step - (history.unfinished is not None)
    limits = SkipLimits(recipe, first_step, lineage(ledger.entries).skips)
    with Saver(run, plan, recipe, source, checkpoints, metrics, ledger, history, clock) as saver:
        alerts = AlertActions(recipe, checkpoints.parent, metrics, ledger, first_step, saver.settle)
        recorder = _Recorder(run, evaluators, metrics, ScoreBook(metrics, ledger), saver, speed, clock, alerts.measured)
        before = () if history.unfinished is not None else recorder.evaluations_at_start(plan)
        if before and should_stop():
            return
        for result, unfinished in _steps(run, source, history.unfinished):
            completed, due = result.step + 1, plan if unfinished is None else unfinished.plan
            log = recorder.step(result, due.wants_log(completed))
            if result.skipped and not (unfinished is not None and skip_is_entered(ledger.entries, completed)):
                _enter_skip(ledger, recipe if unfinished is None else unfinished.recipe, completed)
            measured = recorder.evaluations(due, completed)
            too_many = limits.exceeded(completed, result.skipped)
            verdict = alerts.after((*before, log, *measured))
            told = should_stop()
            stop = told or too_many is not None or verdict.halts or at_target(recipe, measured)
            if told and not time_to_save(needed_s := saver.needed_s()):
                saver.problem(f"not saved: that takes {needed_s:.1f} s, as the last save did, and less time is left")
            elif not verdict.goes_back:  # what comes from bad steps is not saved
                planned = stop or due.wants_state(completed)
                _save(saver, unfinished, planned, lambda: should_save() or saver.is_due(), verdict.saves)
            saved = saver.finished(wait=stop or completed == plan.last_step)
            problems = (*saver.problems(), *(alerts.problems() if log is not None else ()))
            yield TrainedStep(result, log, (*before, *measured), saved, verdict.alerts, problems)
            before = ()
            if too_many is not None:
                raise _skipped_too_many(result.step, too_many)
            verdict.end(completed)
            if stop:
                return


def _save(saver: Saver, unfinished: Unfinished | None, planned: bool, asked: Callable[[], bool], alert: bool) -> None:
    """Save what is planned, asked for now or wanted by an alert. Besides the plan, a backend whose state can be read at
    planned steps only goes on, and the user is told.
    """
    if planned:
        saver.begin(unfinished)
    elif asked() or alert:
        try:
            saver.begin(unfinished)
        except BackendError as error:
            saver.problem(f"no checkpoint was made: {error}")


def _skipped_too_many(step: int, which: str) -> NonFiniteError:
    return NonFiniteError(
        f"step {step}: {which}: the state after {step + 1} completed steps is saved; look at the skipped samples "
        "(`weftrain log` lists them), lower the learning rate, or raise that limit with --allow and go on"
    )


def at_target(recipe: Recipe, measured: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the held-out losses among lines of metrics.jsonl, those of one step, have reached the recipe's
    `log.stop_at_loss`.
    """
    target, losses = recipe.log.stop_at_loss, [line["loss"] for line in measured if line["kind"] == "evaluation"]
    return target is not None and bool(losses) and all(loss <= target for loss in losses)


def _steps(
    run: Run, source: BatchSource, unfinished: Unfinished | None
) -> Iterator[tuple[StepResult, Unfinished | None]]:
    if unfinished is not None:
        yield unfinished.result, unfinished
    for result in run.train(source):
        yield result, None


def _enter_skip(ledger: Ledger, recipe: Recipe, completed: int) -> None:
    first = recipe.timeline.sample(completed - 1)
    ledger.add("skip", step=completed, samples=[first, first + recipe.batch.global_batch_size])


class _Recorder:
    """Writes what was measured into metrics.jsonl: a line for a step, for an evaluation, and for a new peak speed."""

    def __init__(
        self,
        run: Run,
        evaluators: Sequence[Evaluator],
        metrics: MetricsWriter,
        scores: ScoreBook,
        saver: Saver,
        speed: Speed,
        clock: Callable[[], float],
        besides: Callable[[], Mapping[str, float]],
    ) -> None:
        self._run, self._evaluators, self._metrics, self._scores, self._saver = run, evaluators, metrics, scores, saver
        self._besides = besides
        self._speed, self._clock = speed, clock
        self._tokens, self._duration_ms = 0, 0.0  # since the last line

    def step(self, result: StepResult, due: bool) -> dict[str, Any] | None:
        """Count a step, and write its line if it is due or the step was skipped."""
        self._tokens, self._duration_ms = self._tokens + result.tokens, self._duration_ms + result.step_ms
        self._saver.tokens_read += result.tokens
        if not (due or result.skipped):
            return None
        tokens_per_second = self._tokens / self._duration_ms * 1e3 if self._duration_ms else math.nan
        self._tokens, self._duration_ms = 0, 0.0
        speed = self._speed.allowing(tokens_per_second)
        if speed is not self._speed:  # this step exceeds the peak: a higher one is recorded before its line
            self._metrics.event("peak", step=result.step + 1, **speed.as_record())
        self._speed = speed
        line = {
            "step": result.step + 1,
            "loss": float(result.loss),
            **{name: float(value) for name, value in result.measures.items()},
            "grad_norm": float(result.grad_norm),
            "learning_rate": dict(result.learning_rates),
            "tokens": self._saver.tokens_read,
            "bearing_tokens": result.bearing_tokens,  # of this step: what its loss is the mean over
            "tokens_per_second": tokens_per_second,
            "step_ms": result.step_ms,
            "data_wait_ms": result.data_wait_ms,
            "model_flops_utilization": speed.utilization(tokens_per_second),
            "skipped": result.skipped,
            **self._run.stats(),
            **self._besides(),
        }
        self._metrics.step(line)
        self._saver.measured({"kind": "step", **line})
        return {"kind": "step", **line}

    def evaluations(self, plan: Plan, completed: int) -> tuple[dict[str, Any], ...]:
        """Measure and record what is due after a step, each line as soon as it is known."""
        due = [evaluator for evaluator in self._evaluators if evaluator.is_due(plan, completed)]
        return tuple(line for evaluator in due for line in self._measure(evaluator, completed))

    def evaluations_at_start(self, plan: Plan) -> tuple[dict[str, Any], ...]:
        scored = self._scores.entered(plan.start_step)
        due = [evaluator for evaluator in self._evaluators if evaluator.is_due_at_start(plan, scored)]
        return tuple(line for evaluator in due for line in self._measure(evaluator, plan.start_step))

    def _measure(self, evaluator: Evaluator, completed: int) -> Iterator[dict[str, Any]]:
        began = self._clock()
        for measured in evaluator.measure(self._run, completed):
            ended = self._clock()
            line, began = {**measured, "evaluation_s": ended - began}, ended
            if line["kind"] == SCORE:
                if not self._scores.enter(line):
                    continue
            else:
                self._metrics.measured(line)
                self._saver.measured(line)
            yield line
