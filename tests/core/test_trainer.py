"""The training loop: what it records of each step and evaluation, and when it ends."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weftrain.core.backend import EvalResult, Plan, Run, StepResult
from weftrain.core.config import Recipe
from weftrain.core.evaluators import Evaluator, HeldOutLoss, MetricsRecord
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import MetricsWriter, read_metrics
from weftrain.core.run.speed import Peak, Speed
from weftrain.core.trainer import TrainedStep, at_target, fit

Tiny = Callable[..., Recipe]
HELD = SimpleNamespace(name="words", num_rows=4, rows_available=9, dataset_id="d" * 64)
RESULTS = [StepResult(step, 3.0 - step, 1.0, {}, 100, 90, step_ms, 0.0) for step, step_ms in enumerate((500, 250, 300))]


class Told:
    """A run whose steps are told beforehand. It cannot save."""

    def __init__(self, results: Sequence[StepResult]) -> None:
        self.results = results

    def train(self, source: Any) -> Iterator[StepResult]:
        yield from self.results

    def evaluate(self, source: Any) -> EvalResult:
        return EvalResult(2.0, 64)

    def stats(self) -> dict[str, float]:
        return {"memory_bytes": 5.0}


class Clock:
    """Stands still unless it is told how long something takes."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Texts:
    """An evaluator that writes the next of its texts and takes two seconds for it."""

    def __init__(self, clock: Clock, *texts: str, at_start: bool = False) -> None:
        self.clock, self.texts, self.at_start = clock, iter(texts), at_start

    def is_due(self, plan: Plan, completed: int) -> bool:
        return plan.wants_evaluation(completed)

    def is_due_at_start(self, plan: Plan, scored: Set[str]) -> bool:
        return self.at_start

    def measure(self, run: Run, completed: int) -> Iterator[MetricsRecord]:
        self.clock.now += 2.0
        yield {"kind": "sample", "step": completed, "prompt": "a", "text": next(self.texts)}


def trained(
    results: Sequence[StepResult],
    recipe: Recipe,
    folder: Path,
    *more: Evaluator,
    clock: Callable[[], float] = time.monotonic,
    **wanted: Any,
) -> list[TrainedStep]:
    wanted = {"evaluate_every_steps": 2, "log_every_steps": 2, "checkpoint_at_end": False, **wanted}
    where, source = folder / "checkpoints", synthetic_source(97, 13, 12, 4, seed=5)
    with MetricsWriter(folder) as metrics:
        run: Any = Told(results)
        held: Any = [HELD]
        speed = Speed(1.0, Peak(None, ""))
        place = (source, [HeldOutLoss(held), *more], where, metrics, Ledger(folder))
        return list(fit(run, Plan(0, len(results), **wanted), recipe, *place, speed=speed, clock=clock))


def test_a_line_is_about_the_steps_since_the_one_before(tiny_recipe: Tiny, tmp_path: Path) -> None:
    found = trained([*RESULTS, dataclasses.replace(RESULTS[2], step=3, step_ms=100)], tiny_recipe(), tmp_path)
    lines = [one.log for one in found]
    assert [line is not None for line in lines] == [True, True, False, True]
    assert [line["tokens_per_second"] for line in lines if line] == pytest.approx([200, 400, 500])
    assert [line["tokens"] for line in lines if line] == [100, 200, 400]
    assert lines[0] is not None
    assert (lines[0]["loss"], lines[0]["memory_bytes"]) == (3.0, 5.0)
    assert [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "step"] == [1, 2, 4]


def test_an_evaluation_is_recorded_with_what_it_read(tiny_recipe: Tiny, tmp_path: Path) -> None:
    measured = [one.measured for one in trained(RESULTS, tiny_recipe(), tmp_path, clock=Clock())]
    assert [len(one) for one in measured] == [0, 1, 1]
    wanted = {"set": "words", "loss": 2.0, "perplexity": math.exp(2), "tokens": 64, "rows": 4, "rows_available": 9}
    wanted |= {"step": 2, "dataset_id": "d" * 64, "evaluation_s": 0.0}
    assert measured[1][0] == {"kind": "evaluation", **wanted}


def test_evaluators_follow_one_another_and_their_time_is_their_own(tiny_recipe: Tiny, tmp_path: Path) -> None:
    clock = Clock()
    found = trained(RESULTS, tiny_recipe(), tmp_path, Texts(clock, "one", "two"), clock=clock)
    assert [[line["kind"] for line in one.measured] for one in found] == [[], *[["evaluation", "sample"]] * 2]
    records = read_metrics(tmp_path)
    lines = [(one["step"], one["text"], one["evaluation_s"]) for one in records if one["kind"] == "sample"]
    assert lines == [(2, "one", 2.0), (3, "two", 2.0)]
    assert [one["evaluation_s"] for one in records if one["kind"] == "evaluation"] == [0.0, 0.0]
    assert [one["tokens_per_second"] for one in records if one["kind"] == "step"] == pytest.approx(
        [200, 400, 1e5 / 300]
    )


def test_an_evaluation_before_the_first_step(tiny_recipe: Tiny, tmp_path: Path) -> None:
    texts = Texts(Clock(), "zero", "one", "two", at_start=True)
    found = trained(RESULTS, tiny_recipe(), tmp_path, texts, evaluate_at_start=True)
    assert [[line["step"] for line in one.measured] for one in found] == [[0, 0], [2, 2], [3, 3]]
    assert [one["step"] for one in read_metrics(tmp_path) if one["kind"] == "evaluation"] == [0, 2, 3]


def test_a_skipped_step_has_a_line_in_the_metrics_and_the_ledger(tiny_recipe: Tiny, tmp_path: Path) -> None:
    skipped = dataclasses.replace(RESULTS[2], loss=math.nan, skipped=True)
    recipe = tiny_recipe("crystal", "optimizer.non_finite=skip", "optimizer.max_skip_share=1", "schedule.steps=4")
    found = trained([*RESULTS[:2], skipped, dataclasses.replace(RESULTS[0], step=3)], recipe, tmp_path)
    assert found[2].log is not None
    assert found[2].log["skipped"]
    assert [(line["step"], line["samples"]) for line in read_ledger(tmp_path / LEDGER)] == [(3, [8, 12])]


def test_a_target_is_reached_by_every_held_out_set(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", "log.evaluate_every_steps=2", "log.stop_at_loss=2.0")
    losses = ([], [2.0], [2.01], [1.0, 2.0], [1.0, 2.01], [math.nan])
    reached = [at_target(recipe, [{"kind": "evaluation", "loss": loss} for loss in each]) for each in losses]
    assert reached == [False, True, False, True, False, False]
    assert not at_target(recipe, [{"kind": "score", "loss": 0.0}])
    assert not at_target(tiny_recipe("amber"), [{"kind": "evaluation", "loss": 0.0}])
