"""The RESULT line, programs under comparison, and the same start as a bare torch program."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from invented_runs import Clock, InventedRun, Tiny
from places import SHARED

from weftrain.analysis.bench.train import BenchError, bench_source, plain_weights, run_program, take_steps
from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan, StepResult
from weftrain.core.recipe_file import load_recipe

BARE_LOOP = SHARED / "bench" / "plain_loop.py"


def result_line(**changes: Any) -> str:
    return "RESULT " + json.dumps(
        {"name": "n", "tokens_per_second": 10.0, "step_ms": 1.0, "loss_first": 2.0, "loss_last": 1.0} | changes
    )


def test_programs_and_their_failures() -> None:
    def program(text: str) -> list[str]:
        return [sys.executable, "-c", text]

    assert run_program(program(f"print('noise'); print({result_line()!r})"), 30)["tokens_per_second"] == 10.0
    for text, expected in [
        ("print('no result')", "0 RESULT lines; its last words: no result"),
        ("raise SystemExit('it broke')", "exit code 1, 0 RESULT lines; its last words: it broke"),
        ("print('RESULT {')", "is not JSON"),
        ("print('RESULT [1]')", "lacks name"),
        ("import time; time.sleep(9)", "did not finish within 1 s"),
    ]:
        with pytest.raises(BenchError, match=expected):
            run_program(program(text), 1 if "sleep" in text else 30)
    with pytest.raises(BenchError, match="no such program"):
        run_program(["/no/such/program"], 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens_per_second": 0}, "tokens_per_second = 0: a number above 0"),
        ({"tokens_per_second": "fast"}, "a number above 0"),
        ({"loss_last": None}, "loss_last = null: a number"),
        ({"losses": []}, "losses = "),
        ({"last_step": 0}, "last_step = 0: the number of the step"),
        ({"step_times_ms": [1.0, 0.0]}, "step_times_ms = "),
        ({"name": ""}, "name = "),
    ],
)
def test_a_result_line_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        run_program(["printf", "%s\n", result_line(**changes)], 30)


def test_plain_weights_only_for_models_of_that_shape() -> None:
    assert plain_weights(load_recipe("crystal_demo").recipe.model) is None
    weights = plain_weights(load_recipe("amber_demo").recipe.model)
    assert weights is not None
    assert weights["layers.3.ffn.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.prove
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("compute", "steps", "tolerance"),
    [
        ("float32", 3, 1e-4),
        # bf16 rounds differently in every formulation: the bare loop's own eager and compiled losses part by 1.8e-3
        # within 14 steps.
        pytest.param("bfloat16", 10, 4e-3, marks=pytest.mark.soak),
    ],
)
def test_the_bare_loop_trains_the_same_model(compute: str, steps: int, tolerance: float) -> None:
    """bench_70m from the bare loop's weights on its rows: the same losses, step by step."""
    if not BARE_LOOP.exists():
        pytest.skip("the bare loop is not beside this checkout")
    spec = importlib.util.spec_from_file_location("bare_loop", BARE_LOOP)
    assert spec is not None
    assert spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    recipe = load_recipe("bench_70m", ["backend.options.compile=false", f"precision.compute={compute}"]).recipe
    torch.manual_seed(0)
    theirs = bare.Decoder()
    weights = plain_weights(recipe.model)
    assert weights is not None
    assert torch.equal(theirs.embed.weight, weights["embedding.weight"])
    assert torch.equal(theirs.blocks[11].qkv.weight.chunk(3)[1], weights["layers.11.attention.k_proj.weight"])
    assert torch.equal(theirs.head.weight, weights["head.weight"])
    source = bench_source(recipe)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    backend = get_backend("local")
    run = backend.prepare(Job(recipe, Plan(0, steps), backend.options.model_validate(recipe.backend.options), weights))
    for result in run.train(source):
        ids = torch.from_numpy(source.rows(result.step, 0, 2).ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
            loss = theirs(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        assert float(result.loss) == pytest.approx(loss.item(), abs=tolerance), result.step


def test_the_yardstick_stands_beside_the_step_and_not_in_it(clock: Clock, tiny_recipe: Tiny) -> None:
    """The machine slows down to half: a step takes twice as long, and as many yardsticks as before."""
    pace = iter([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])

    def probe() -> float:
        ms = 4.0 * next(pace)
        clock.now += ms / 1e3
        return ms

    run = InventedRun(clock, [10.0, 10.0, 15.0, 20.0, 20.0, 20.0], gap_ms=0.0)
    found = take_steps(run, bench_source(tiny_recipe()), probe=probe)  # type: ignore[arg-type]
    assert found.step_ms == pytest.approx([10.0, 10.0, 15.0, 20.0, 20.0, 20.0])
    assert found.probe_ms == pytest.approx([4.0, 4.0, 4.0, 8.0, 8.0, 8.0, 8.0])


def test_a_skipped_step_has_no_speed(clock: Clock, tiny_recipe: Tiny) -> None:
    class Skips(InventedRun):
        def train(self, source: Any) -> Iterator[StepResult]:
            for result in super().train(source):
                yield StepResult(result.step + (result.step > 1), 1.0, 1.0, {}, 52, 52, 1.0, 0.0)

    with pytest.raises(BenchError, match="step 3 was skipped or is out of order"):
        take_steps(Skips(clock, [1.0] * 4), bench_source(tiny_recipe()))  # type: ignore[arg-type]


def test_mutation_a_missing_synchronisation_is_seen(clock: Clock, tiny_recipe: Tiny) -> None:
    """On a device that computes while the host runs on, only reading the loss waits: without that a step would take
    nothing.
    """

    class Late:
        def __init__(self) -> None:
            self.read = False

        def __float__(self) -> float:
            clock.now += 0.040
            return 5.0

    class Asynchronous(InventedRun):
        def train(self, source: Any) -> Iterator[StepResult]:
            for step in range(4):
                clock.now += 0.001
                yield StepResult(step, Late(), 1.0, {}, 52, 52, 1.0, 0.0)

    found = take_steps(Asynchronous(clock, []), bench_source(tiny_recipe()))  # type: ignore[arg-type]
    assert found.step_ms == pytest.approx([41.0] * 4)
