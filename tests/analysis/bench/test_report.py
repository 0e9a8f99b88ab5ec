"""Every figure of a report by hand, with an invented clock and known counts; and three ways to get it wrong that are
caught.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from weftrain.analysis.bench import run as bench_run
from weftrain.analysis.bench import train as bench_train
from weftrain.analysis.bench.pages import csv_text, flat, html_page, markdown, mllog_lines, write_report
from weftrain.analysis.bench.report import (
    BenchReport,
    BenchRound,
    ReportError,
    breakdown_of,
    configuration_differences,
    correctness_of,
    efficiency_of,
    read_report,
    speed_of,
)
from weftrain.analysis.bench.run import BenchRequest, bench
from weftrain.analysis.bench.sweep import combinations, run_sweep
from weftrain.analysis.bench.train import BenchError, bench_source, take_steps
from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import StepResult
from weftrain.core.config import Recipe
from weftrain.core.parameters import flops_per_token
from weftrain.core.run.speed import Peak

Tiny = Callable[..., Recipe]


class Clock:
    """Seconds of an invented clock."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class InventedRun:
    """Steps that take given ms: forward 5, backward 3 of them each, 1 beside the parts, and `gap_ms` outside of the
    backend.
    """

    def __init__(self, clock: Clock, ms: list[float], gap_ms: float = 0.5) -> None:
        self.clock, self.ms, self.gap_ms = clock, ms, gap_ms

    def train(self, source: Any) -> Iterator[StepResult]:
        for step, ms in enumerate(self.ms):
            self.clock.now += ms / 1e3
            phases = {"data wait": 0.25, "forward": 5.0, "backward": 3.0, "update": ms - 9.25}
            yield StepResult(step, 5.0 - step / 10, 1.0, {}, 52, 52, ms, 0.25, phases_ms=phases)
            self.clock.now += self.gap_ms / 1e3

    def stats(self) -> dict[str, float]:
        return {"memory_bytes": 7.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bench_train.time, "perf_counter", clock.perf_counter)
    return clock


def measured(clock: Clock, recipe: Recipe, ms: list[float]) -> BenchRound:
    return take_steps(InventedRun(clock, ms), bench_source(recipe))  # type: ignore[arg-type]


def test_speed_by_hand(clock: Clock, tiny_recipe: Tiny) -> None:
    found = measured(clock, tiny_recipe(), [900.0, 10.0, 12.0, 11.0, 20.0])
    assert found.step_ms == pytest.approx([900.0, 10.5, 12.5, 11.5, 20.5])  # the gap before a result counts to its step
    speed = speed_of([found], tokens_per_step=52, devices=2)
    assert speed.warm_up_steps == 1
    assert speed.step_ms_p50 == pytest.approx(12.0)
    assert speed.tokens_per_second == pytest.approx(52 / 0.012)
    assert speed.tokens_per_second_per_device == pytest.approx(52 / 0.012 / 2)
    assert (speed.step_ms_min, speed.step_ms_mean) == pytest.approx((10.5, 13.75))
    assert speed.step_ms_p90 == pytest.approx(12.5 + 0.7 * 8)
    assert speed.compile_s == pytest.approx(0.888)
    assert speed.step_ms_p50_low <= 12.0 <= speed.step_ms_p50_high


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


def test_the_parts_add_up_to_the_step(clock: Clock, tiny_recipe: Tiny) -> None:
    found = measured(clock, tiny_recipe(), [900.0, 10.0, 12.0, 11.0, 20.0])
    parts, _ = breakdown_of([found], 1)
    assert sum(parts.values()) == pytest.approx(13.75)
    assert parts["forward"] == 5.0
    assert parts["data wait"] == 0.25
    assert parts["host gap"] == pytest.approx(0.5)
    assert parts["remainder"] == pytest.approx(1.0)  # what InventedRun leaves out of its parts
    untimed = found.model_copy(update={"phases_ms": [{}] * 5})
    parts, note = breakdown_of([untimed], 1)
    assert sum(parts.values()) == pytest.approx(13.75)
    assert "does not time the parts" in note


def test_efficiency_by_hand(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber")
    per_token = flops_per_token(recipe.model, 13)
    found = efficiency_of(recipe, 1000.0, (per_token * 4000.0, "here"), (None, "no sourced peak"), "none")
    assert found.flops_per_second == per_token * 1000
    assert found.mfu_measured == pytest.approx(0.25)
    assert (found.mfu_sourced, found.sourced_peak_flops, found.hfu_measured) == ("unknown", "unknown", None)
    again = efficiency_of(recipe, 1000.0, (per_token * 4000.0, "here"), (None, ""), "full")
    head = 6 * 97 * 48
    assert again.hfu_measured == pytest.approx((per_token + (per_token - head) / 3) / per_token / 4)
    assert again.mfu_measured == found.mfu_measured


def test_correctness() -> None:
    assert correctness_of([5.0, 4.0], [5.0, 4.0001], "float32").passed is True
    assert correctness_of([5.0, 4.0], [5.0, 4.01], "float32").passed is False
    assert correctness_of([5.0, float("nan")], [5.0, 4.0], "bfloat16").passed is False
    unchecked = correctness_of([5.0], [], "float32", "too large")
    assert (unchecked.passed, unchecked.words) == (None, "too large")


def test_a_skipped_step_has_no_speed(clock: Clock, tiny_recipe: Tiny) -> None:
    class Skips(InventedRun):
        def train(self, source: Any) -> Iterator[StepResult]:
            for result in super().train(source):
                yield StepResult(result.step + (result.step > 1), 1.0, 1.0, {}, 52, 52, 1.0, 0.0)

    with pytest.raises(BenchError, match="step 3 was skipped or is out of order"):
        take_steps(Skips(clock, [1.0] * 4), bench_source(tiny_recipe()))  # type: ignore[arg-type]


def test_too_few_steps(clock: Clock, tiny_recipe: Tiny) -> None:
    with pytest.raises(ReportError, match="give more --steps"):
        speed_of([measured(clock, tiny_recipe(), [9.0, 1.0])], 52, 1)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    from weftrain.core.recipe_file import load_recipe

    recipe = load_recipe(
        "bench_70m", ["model.num_layers=1", "model.vocab_size=300", "data.sequence_length=32", "backend.options={}"]
    ).recipe
    local = get_backend("local")
    return bench(recipe, local, local.options(), local, BenchRequest(steps=6, rounds=2))


def test_a_real_report(report: BenchReport, tmp_path: Path) -> None:
    """Of a small model: the parts explain the step, the losses are the reference's, and every page says what
    report.json says.
    """
    assert report.correctness.passed is True
    assert report.correctness.checked_steps == 2
    assert sum(report.breakdown_ms.values()) == pytest.approx(report.speed.step_ms_mean, rel=1e-6)
    assert abs(report.breakdown_ms["remainder"]) < 0.03 * report.speed.step_ms_mean
    assert report.speed.counted_steps == 2 * (6 - report.speed.warm_up_steps)
    assert report.identity["recipe"]["name"] == "bench_70m"
    assert report.kernels["ops"]
    paths = {path.name: path for path in write_report(report, tmp_path)}
    assert read_report(tmp_path) == report
    assert paths["report.png"].read_bytes().startswith(b"\x89PNG")
    rate = f"{report.speed.tokens_per_second:,.1f}"
    page = html_page(report, b"x")
    assert rate in markdown(report)
    assert rate in page
    assert 'src="http' not in page
    row = next(csv.DictReader(io.StringIO(csv_text([flat(report)]))))
    assert float(row["tokens_per_second"]) == report.speed.tokens_per_second


def test_steps_in_units_of_the_yardstick(report: BenchReport) -> None:
    speed = report.speed.model_copy(update={"warm_up_steps": 1})
    changes = {"speed": speed, "rounds": [[99.0, 10.0, 15.0, 20.0]], "probes": [[4.0, 4.0, 4.0, 8.0, 8.0]]}
    assert report.model_copy(update=changes).in_probes == [[2.5, 2.5, 2.5]]
    assert report.model_copy(update=changes | {"probes": [[]]}).in_probes is None


def test_mllog(report: BenchReport) -> None:
    lines = list(mllog_lines(report, 1, 2))
    assert all(line.startswith(":::MLLOG {") for line in lines)
    entries = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    assert [entry["key"] for entry in entries][-3:] == ["run_start", "tracked_stats", "run_stop"]
    assert entries[-1]["metadata"]["status"] == "success"
    assert entries[-2]["value"]["throughput"] == pytest.approx(report.speed.tokens_per_second / 32)


def test_differences_of_configuration(report: BenchReport) -> None:
    assert configuration_differences(report, report) == []
    recipe = {**report.identity["recipe"], "seed": 7}
    other = report.model_copy(update={"identity": {**report.identity, "recipe": recipe}, "kernels": {}})
    found = configuration_differences(report, other)
    assert "recipe.seed: 0 -> 7" in found
    assert any(line.startswith("kernels.") for line in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{}", "name: Field required"),
        (b"no", "Invalid JSON"),
        (b'{"schema_version": 2}', "schema_version: Input should be 1"),
    ],
)
def test_files_that_are_no_reports(text: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(ReportError, match=words):
        read_report(tmp_path)
    with pytest.raises(ReportError, match="is not there"):
        read_report(tmp_path / "nothing")


# Sweeps


def test_sweep_goes_on_and_records_what_fails(report: BenchReport, tmp_path: Path) -> None:
    """By a program that fails as a benchmark does: refused, out of memory, killed, too slow; what was measured is not
    measured again.
    """
    (tmp_path / "canned.json").write_text(report.model_dump_json())
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, shutil, signal, sys, time\n"
        "*_, option, folder = sys.argv\n"
        "case = sys.argv[1].partition('=')[2]\n"
        "if case == 'refused': sys.exit('weftrain: no such kernel')\n"
        "if case == 'memory': sys.exit('weftrain: out of memory: tried to allocate')\n"
        "if case == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if case == 'slow': time.sleep(60)\n"
        "os.makedirs(folder)\n"
        f"shutil.copy({str(tmp_path / 'canned.json')!r}, pathlib.Path(folder) / 'report.json')\n"
    )
    command, told = [sys.executable, str(program)], []
    # The slow one alone has little time: on a busy machine the others may need some to start.
    slow = run_sweep(command, combinations(["case=slow"]), tmp_path / "slow", 1, lambda done, words: None)
    assert [row["error"] for row in slow] == ["did not finish within 1 s"]
    chosen = combinations(["case=refused,memory,killed,good"])
    rows = run_sweep(command, chosen, tmp_path / "sweep", 60, lambda done, words: told.append(words))
    assert told == [f"case={case}" for case in ("refused", "memory", "killed", "good")]
    assert float(rows[-1]["tokens_per_second"]) == report.speed.tokens_per_second
    memory = ["out of memory: weftrain: out of memory: tried to allocate", "out of memory: killed by the system"]
    assert [row["error"] for row in rows] == ["no such kernel", *memory, ""]
    before = (tmp_path / "sweep" / "case=good" / "report.json").stat().st_mtime_ns
    more = combinations(["case=good,refused,new"])
    again = run_sweep(command, more, tmp_path / "sweep", 60, lambda done, words: None)
    assert [row["error"] for row in again] == ["", "no such kernel", ""]
    assert (tmp_path / "sweep" / "case=good" / "report.json").stat().st_mtime_ns == before
    with pytest.raises(BenchError, match="is of another sweep"):
        run_sweep(command, combinations(["other=1"]), tmp_path / "sweep", 60, lambda done, words: None)


def test_combinations() -> None:
    assert combinations(["a=1,2", "b=[x,y],[z]"]) == [
        (("a", "1"), ("b", "[x,y]")),
        (("a", "1"), ("b", "[z]")),
        (("a", "2"), ("b", "[x,y]")),
        (("a", "2"), ("b", "[z]")),
    ]
    for wrong in (["a"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(BenchError):
            combinations(wrong)


# Mutations: a benchmark that is wrong in one of these ways must not give the same report.


def test_mutation_a_wrong_peak_is_seen(report: BenchReport, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Tiny) -> None:
    """The peak in a report is what was measured: half of it doubles the utilisation, and its origin is told."""
    local = get_backend("local")
    recipe = tiny_recipe("amber")
    shares = []
    for peak in (1e12, 5e11):
        monkeypatch.setattr(bench_run, "measured_peak", lambda device, dtype, peak=peak: Peak(peak, "planted"))
        found = bench(recipe, local, local.options(), local, BenchRequest(steps=5, check_steps=0))
        shares.append(float(found.efficiency.mfu_measured) / found.efficiency.flops_per_second)
        assert found.efficiency.measured_peak_origin == "planted"
    assert shares[1] == pytest.approx(2 * shares[0])


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


@pytest.mark.prove
def test_mutation_wrong_losses_fail_the_benchmark(monkeypatch: pytest.MonkeyPatch, tiny_recipe: Tiny) -> None:
    """Training half of the batch is faster: its losses give it away."""
    local, recipe = get_backend("local"), tiny_recipe("amber")

    class Half:
        def __getattr__(self, name: str) -> Any:
            return getattr(local, name)

        def prepare(self, job: Any) -> Any:
            small = recipe.batch.model_copy(update={"global_batch_size": 2, "micro_batch_size": 2})
            import dataclasses

            return local.prepare(dataclasses.replace(job, recipe=recipe.model_copy(update={"batch": small})))

    found = bench(recipe, Half(), local.options(), local, BenchRequest(steps=5))  # type: ignore[arg-type]
    assert found.correctness.passed is False
