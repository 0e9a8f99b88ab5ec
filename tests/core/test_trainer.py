"""The training loop: what it records of each step and evaluation, and when it ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weftrain.core.backend import EvalResult, Plan, State, StepResult
from weftrain.core.config import Recipe
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import MetricsWriter, read_metrics
from weftrain.core.run.speed import Peak, Speed
from weftrain.core.trainer import Sampler, TextSample, TrainedStep, at_target, fit

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

    def export_state(self) -> State:
        return State(0, 0, {})

    def stats(self) -> dict[str, float]:
        return {"memory_bytes": 5.0}


def trained(
    results: Sequence[StepResult], recipe: Recipe, folder: Path, sampler: Sampler | None = None
) -> list[TrainedStep]:
    plan = Plan(0, len(results), log_every_steps=2, evaluate_every_steps=2, checkpoint_at_end=False)
    where, source = folder / "checkpoints", synthetic_source(97, 13, 12, 4, seed=5)
    with MetricsWriter(folder, tensorboard=False) as metrics:
        run: Any = Told(results)
        held: Any = [HELD]
        speed = Speed(1.0, Peak(None, ""))
        place = (source, held, where, metrics, Ledger(folder))
        return list(fit(run, plan, recipe, *place, speed=speed, sampler=sampler))


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
    evaluations = [one.evaluations for one in trained(RESULTS, tiny_recipe(), tmp_path)]
    assert [len(one) for one in evaluations] == [0, 1, 1]
    wanted = {"set": "words", "loss": 2.0, "perplexity": math.exp(2), "tokens": 64, "rows": 4, "rows_available": 9}
    assert evaluations[1][0] == {"step": 2, "dataset_id": "d" * 64, **wanted}


def test_texts_are_written_at_each_evaluation(tiny_recipe: Tiny, tmp_path: Path) -> None:
    texts = iter(["one", "two"])
    found = trained(RESULTS, tiny_recipe(), tmp_path, lambda state: [TextSample("a", next(texts))])
    assert [[sample.text for sample in one.samples] for one in found] == [[], ["one"], ["two"]]
    records = [record for record in read_metrics(tmp_path) if record["kind"] == "sample"]
    assert [(one["step"], one["prompt"], one["text"]) for one in records] == [(2, "a", "one"), (3, "a", "two")]
    assert all("problem" not in one for one in records)


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
    reached = [at_target(recipe, [{"loss": loss} for loss in each]) for each in losses]
    assert reached == [False, True, False, True, False, False]
    assert not at_target(tiny_recipe("amber"), [{"loss": 0.0}])
