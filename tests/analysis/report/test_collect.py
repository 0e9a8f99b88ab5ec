"""A run's page: what is collected from the record, that no spike and no branch is lost, and that a stranger's words
stay words.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from weftrain.analysis.evaluation.records import FOLDER, EvaluatedCheckpoint, EvaluationSettings, inputs_of, once
from weftrain.analysis.markup import escape
from weftrain.analysis.memorization.scores import FORMAT, Parameters, figures, result_path
from weftrain.analysis.report import collect as collected
from weftrain.analysis.report import curves
from weftrain.analysis.report.chart import MAX_POINTS, Chart, Curve, chart_html, even_ticks, medians, thinned
from weftrain.analysis.report.collect import RunReport, collect
from weftrain.analysis.report.curves import read_curves
from weftrain.analysis.report.ledger import Mark
from weftrain.analysis.report.page import page_html, relative_link, write_page
from weftrain.analysis.report.style import STYLE
from weftrain.analysis.report.summary import summarize
from weftrain.core.config import Recipe
from weftrain.core.errors import RunFolderError
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS, read_metrics

DATASET = "d" * 64
KERNELS = {"ops": {"attention": [{"source": "torch"}]}}


class Made:
    """A run that nobody trained: 6 steps a chunk, 4 chunks; a ledger with a clock of its own and metrics to the same
    effect.
    """

    def __init__(self, run: Path, steps: int = 24, chunks: int | None = 4) -> None:
        self.run, self.now, self.parent = run, 1000.0, None
        (run / "checkpoints").mkdir(parents=True)
        cut = [f"schedule.steps={steps}", f"data.chunks={'null' if chunks is None else chunks}"]
        self.recipe: Recipe = load_recipe("crystal_demo", cut).recipe
        self.json = self.recipe.model_dump(mode="json")
        self.batch = self.recipe.batch.global_batch_size
        (run / "recipe.json").write_bytes(canonical_json(self.json) + b"\n")
        self.ledger = Ledger(run, clock=lambda: self.now)
        self.environment: dict[str, Any] = {
            "backend": "local",
            "device": "x86_64",
            "weftrain": "9.9",
            "kernels": KERNELS,
        }
        self.roots: dict[int, str] = {}
        self.parent: str | None

    def metric(self, kind: str, **fields: Any) -> None:
        with (self.run / METRICS).open("a") as file:
            file.write(json.dumps({"kind": kind, "time": self.now, **fields}) + "\n")

    def go(
        self, first: int, last: int, *, loss: float = 2.0, save: Sequence[int] = (), skip: Sequence[int] = ()
    ) -> None:
        """Train from step `first` to `last`: a start, or a resume where there was one."""
        self.now += 10
        self.ledger.open_run(first, self.json, DATASET, self.environment, self.parent)
        if (self.run / METRICS).exists():
            self.metric("resume", step=first)
        self.ledger.chunk_begin(first, self.recipe, DATASET, self.parent)
        for step in range(first + 1, last + 1):
            self.now += 1
            self.step(step, loss, step in skip)
            if step in skip:
                self.ledger.add("skip", step=step, samples=[(step - 1) * self.batch, step * self.batch])
            if step in save:
                self.save(step, loss)

    def step(self, step: int, loss: float, skipped: bool = False) -> None:
        rates = {"embeddings": step * 1e-3, "norms": step * 1e-3, "matrices": step * 1e-4}
        value = "nan" if skipped else loss + step / 1000
        figures = {
            "tokens_per_second": 100.0 + step,
            "tokens": step * 10,
            "grad_norm": 1.0,
            "learning_rate": rates,
            "skipped": skipped,
        }
        self.metric("step", step=step, loss=value, **figures)

    def save(self, step: int, loss: float) -> None:
        root = sha256_json([step, loss])
        (self.run / "checkpoints" / folder_name(step)).mkdir()
        measured = {"metrics_after": 0, "metrics_sha256": sha256_json(["metrics", step, loss])}
        self.ledger.checkpoint(self.recipe, DATASET, step=step, root=root, parent=self.parent, **measured)
        self.parent = self.roots[step] = root
        self.metric(
            "evaluation", step=step, set="words", loss=loss + 0.5, perplexity=1.0, tokens=1, rows=4, rows_available=9
        )
        if step < self.recipe.schedule.steps:
            self.ledger.chunk_begin(step, self.recipe, DATASET, root)

    def roll_back(self, step: int, branch: int, reason: str) -> None:
        self.now += 5
        gone = [[later, root] for later, root in self.roots.items() if later > step]
        self.ledger.add("rollback", step=step, root=self.roots[step], branch=branch, abandoned=gone, reason=reason)
        (self.run / "branches" / str(branch)).mkdir(parents=True)
        for later, _ in gone:
            name = folder_name(later)
            (self.run / "checkpoints" / name).rename(self.run / "branches" / str(branch) / name)
            del self.roots[later]
        self.parent = self.roots[step]


def report_of(run: Path) -> RunReport:
    return collect(run, lambda recipe: ["tokens       52 x 6 = 312", "chunks       4 x 6 steps"])


def page_of(run: Path) -> str:
    return page_html(report_of(run), run)


@pytest.fixture
def eventful(tmp_path: Path) -> Made:
    """A crash that loses two steps, a skipped step, a rollback of one checkpoint, another machine, a chunk put off, and
    the end.
    """
    made = Made(tmp_path / "eventful")
    made.go(0, 8, save=[6])
    made.go(6, 18, save=[12, 18], skip=[9, 14], loss=3.0)
    made.roll_back(12, 1, "the loss rose")
    made.ledger.add("defer", step=12, chunk=2, action="defer", reason="a spike")
    made.environment = {
        **made.environment,
        "device": "other",
        "kernels": {"ops": {"attention": [{"source": "triton"}]}},
    }
    made.go(12, 24, save=[18, 24], loss=1.0)
    made.ledger.add("end", step=24)
    return made


# What is collected


def test_what_was_left_is_apart_from_what_counts(eventful: Made) -> None:
    report = report_of(eventful.run)
    own, lost, branch = report.loss
    kept = [(one["step"], one["loss"]) for one in read_metrics(eventful.run) if one["kind"] == "step"]
    assert [step for step, _ in own.points] == list(range(1, 25)) == [step for step, _ in kept]
    assert [value for step, value in own.points if step != 9] == [value for step, value in kept if step != 9]
    assert math.isnan(dict(own.points)[9])
    assert ([step for step, _ in lost.points], lost.left) == ([7, 8], "made again after the restart at step 6")
    assert [step for step, _ in branch.points] == [13, 14, 15, 16, 17, 18]
    assert branch.left == "branch 1, left by the rollback to step 12: the loss rose"
    held = [(trace.name, trace.left is None, [step for step, _ in trace.points]) for trace in report.heldout]
    assert held == [
        ("held-out words (4 of 9 rows)", True, [6, 12, 18, 24]),
        ("held-out words (4 of 9 rows)", False, [18]),
    ]


def test_a_rollback_counts_before_the_run_goes_on(tmp_path: Path) -> None:
    made = Made(tmp_path / "run")
    made.go(0, 18, save=[6, 12, 18])
    made.roll_back(12, 1, "first")
    made.roll_back(6, 2, "then further")
    report = report_of(made.run)
    assert [step for step, _ in report.loss[0].points] == [1, 2, 3, 4, 5, 6]
    assert [(step, trace.left) for trace in report.loss[1:] for step, _ in list(trace.points)[:1]] == [
        (7, "branch 2, left by the rollback to step 6: then further")
    ]
    assert report.status == "not finished: 6 of 24 steps done"


def test_every_event_is_marked(eventful: Made) -> None:
    report = report_of(eventful.run)
    marks = [(mark.kind, mark.step, mark.left) for mark in report.marks]
    assert marks == [
        ("restart", 6, False),
        ("skip", 9, False),
        ("skip", 14, True),
        ("rollback", 12, False),
        ("defer", 12, False),
        ("restart", 12, False),
    ]
    told = [(one.kind, one.step) for one in report.ledger if one.left]
    # Of the crash, then of the rollback: a chunk that begins at the step to which the run went back is begun again.
    assert told == [
        ("chunk_begin", 6),
        ("chunk_begin", 12),
        ("skip", 14),
        ("checkpoint", 18),
        ("chunk_end", 18),
        ("chunk_begin", 18),
    ]
    page = page_of(eventful.run)
    for words in (
        "step 9: step skipped",
        "step 14: step skipped, samples 208 to 223 (left)",
        "step 6: restarted from checkpoint",
    ):
        assert page.count(words) >= 4, words  # in each of the charts
    assert page.count("on branch 1: the loss rose") >= 4
    assert report.status == "complete: 24 steps"
    assert ("incidents", "4", "2 restarts, 1 rollback, 1 skip") in report.tiles


def test_chunks_and_checkpoints(eventful: Made) -> None:
    saved = report_of(eventful.run).checkpoints
    batch, roots = eventful.batch, eventful.roots
    told = [(one.step, one.first_step, one.samples, one.chunk, one.place, one.left is None) for one in saved]
    assert told == [
        (6, 0, (0, 6 * batch), "0", "checkpoints/step_00000006", True),
        (12, 6, (6 * batch, 12 * batch), "1", "checkpoints/step_00000012", True),
        (18, 12, (12 * batch, 18 * batch), "2", "branches/1/step_00000018", False),
        (18, 12, (12 * batch, 18 * batch), "2", "checkpoints/step_00000018", True),
        (24, 18, (18 * batch, 24 * batch), "3", "checkpoints/step_00000024", True),
    ]
    assert [one.parent for one in saved] == [None, roots[6], roots[12], roots[12], roots[18]]
    assert saved[2].left == "left on branch 1: the loss rose"
    assert saved[-1].metrics_sha256 == sha256_json(["metrics", 24, 1.0])
    page = page_of(eventful.run)
    assert '<a href="./checkpoints/step_00000024/">' in page
    assert '<a href="./branches/1/step_00000018/">' in page
    bands = [(band.chunk, band.first_step, band.stop_step) for band in report_of(eventful.run).bands]
    assert bands == [(0, 0, 6), (1, 6, 12), (2, 12, 18), (3, 18, 24)]


def test_a_checkpoint_within_a_chunk_and_one_without_chunks(tmp_path: Path) -> None:
    made = Made(tmp_path / "chunks")
    made.go(0, 8, save=[4, 6, 8])
    assert [(one.step, one.chunk) for one in report_of(made.run).checkpoints] == [
        (4, "0, in part"),
        (6, "0"),
        (8, "1, in part"),
    ]
    made.roll_back(4, 1, "back into chunk 0")
    made.go(4, 5, save=[5])
    assert [(one.step, one.chunk) for one in report_of(made.run).checkpoints][3:] == [(5, "0, in part")]
    plain = Made(tmp_path / "plain", chunks=None)
    plain.go(0, 8, save=[4])
    assert [(one.step, one.chunk) for one in report_of(plain.run).checkpoints] == [(4, "")]


def test_starts_tell_what_counts_and_what_differs(eventful: Made) -> None:
    begun = report_of(eventful.run).starts
    assert [(one.first_step, one.kept, one.reached) for one in begun] == [(0, 6, 8), (6, 12, 18), (12, 24, 24)]
    page = page_of(eventful.run)
    assert re.findall(r'<td class="changed">([^<]*)</td>', page) == ["now other", "now triton"]
    same = page[page.index("The same in every start") :]
    assert "<dt>backend</dt><dd>local</dd>" in same
    assert "<dt>device</dt>" not in same


def test_p50_is_the_summary_s(eventful: Made) -> None:
    summary = summarize(eventful.run)
    assert summary is not None
    throughput = next(one for one in report_of(eventful.run).metrics if one.chart.key == "tokens_per_second")
    assert throughput.median == summary.tokens_per_second
    assert f"p50 {summary.tokens_per_second:,.0f}" in page_of(eventful.run)


def test_an_entry_in_the_table_of_charts_draws_a_figure(eventful: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    charts = (*curves.METRIC_CHARTS, curves.MetricChart("words", "Words", "none", "words"))
    monkeypatch.setattr(curves, "METRIC_CHARTS", charts)
    monkeypatch.setattr(collected, "METRIC_CHARTS", charts)
    lines = eventful.run / "metrics.jsonl"
    before = lines.read_text()
    try:
        lines.write_text(before.replace('"kind": "step",', '"kind": "step", "words": 7,'))
        metric = report_of(eventful.run).metrics[-1]
        assert set(metric.traces[0].points.values.tolist()) == {7.0}
        lines.write_text(before.replace('"kind": "step",', '"kind": "step", "words": "seven",'))
        assert report_of(eventful.run).metrics[-1].traces == ()
    finally:
        lines.write_text(before)


def test_equal_learning_rates_are_one_curve(eventful: Made) -> None:
    assert [trace.name for trace in report_of(eventful.run).learning_rate] == ["embeddings, norms", "matrices"]


def test_equal_records_give_equal_bytes(eventful: Made, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_page(report_of(eventful.run), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


# Analyses


def memorize(run: Path, step: int, root: str, chunk: str, matches: list[int], stop: int | None) -> Path:
    parameters = Parameters(prompt_tokens=4, continuation_tokens=4, samples=len(matches))
    mean, extractible = figures(matches, 4)
    path = result_path(run / "analyses" / "memorization", parameters, step, chunk)
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {
        "format": FORMAT,
        "version": 1,
        "software": {},
        "step": step,
        "root": root,
        "chunk": chunk,
        "kind": "heldout" if stop is None else "training",
        "first_step": None if stop is None else stop - 6,
        "stop_step": stop,
        "dataset_id": DATASET,
        "parameters": parameters.model_dump(),
        "sample_numbers": list(range(len(matches))),
        "rows_sha256": "0" * 64,
        "matches": matches,
        "mean_score": mean,
        "extractible_percent": extractible,
        "repeated": 0,
    }
    path.write_bytes(canonical_json(value) + b"\n")
    return path


def test_memorization_is_a_matrix_with_its_figures_written_out(eventful: Made) -> None:
    for step, matches in ((6, [4, 1, 0, 3]), (12, [2, 2, 2, 2])):
        memorize(eventful.run, step, eventful.roots[step], "chunk_00000", matches, 6)
    memorize(eventful.run, 6, eventful.roots[6], "heldout_words", [0, 0, 0, 1], None)
    damaged = memorize(eventful.run, 12, eventful.roots[12], "heldout_words", [0, 0, 0, 1], None)
    damaged.write_bytes(damaged.read_bytes().replace(b'"matches":[0,0,0,1]', b'"matches":[0,0,0,2]'))
    moved = damaged.with_name("chunk_00001.json")
    moved.write_bytes((damaged.parent / "chunk_00000.json").read_bytes())
    report = report_of(eventful.run)
    (matrix,) = report.memorization
    assert matrix.chunks == ("chunk_00000", "heldout_words")
    assert [step for step, _ in matrix.rows] == [6, 12]
    assert len(report.warnings) == 2
    assert str(moved) in report.warnings[0]
    assert str(damaged) in report.warnings[1]
    page = page_of(eventful.run)
    assert "<b>25.00 %</b> 0.5000 *</td>" in page
    assert "<b>0.00 %</b> 0.5000 +</td>" in page
    assert "<b>0.00 %</b> 0.0625</td>" in page
    assert page.count('title="not measured"') == 1
    assert 'role="note" aria-label="warnings"' in page


def evaluate(run: Path, step: int, root: str, name: str, **found: Any) -> Path:
    inputs = {**inputs_of("task", EvaluatedCheckpoint(root, step), EvaluationSettings()), "task": name}
    measured = {"task": name, "task_version": 1.0, "shots": 5, "metric": "acc", "value": 0.25, "value_percent": 25.0}
    more = {"stderr": 0.01, "stderr_percent": 1.5, "samples": 40, "samples_available": 40, "decoding": None, **found}
    once(run / FOLDER, inputs, name, lambda: {**measured, **more}, print)
    return next((run / FOLDER).glob(f"{step:08d}-*"))


def test_evaluations_are_a_table_and_a_damaged_one_is_said(eventful: Made) -> None:
    evaluate(eventful.run, 24, eventful.roots[24], "mmlu", samples=10)
    evaluate(eventful.run, 18, "e" * 64, "arc", stderr_percent=None, value_percent=None)
    damaged = evaluate(eventful.run, 6, eventful.roots[6], "copa")
    damaged.write_bytes(damaged.read_bytes().replace(b"25.0", b"95.0"))
    report = report_of(eventful.run)
    assert [record["task"] for record in report.evaluations] == ["arc", "mmlu"]
    assert str(damaged) in report.warnings[0]
    page = page_of(eventful.run)
    row = page[page.index('<th scope="row">mmlu') :]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[: row.index("</tr>")])
    assert cells[:7] == ["1.0", "5", "acc", "25.00 ± 1.50", "0.25", "10", "24"]
    assert eventful.roots[24] in cells[7]
    assert cells[8] == "partial"
    assert "not on the line" in page


def test_what_is_absent_is_said(tmp_path: Path) -> None:
    made = Made(tmp_path / "bare")
    page = page_of(made.run)
    for words in (
        "No evaluation was recorded: <code>weftrain eval RUN --tasks ...</code>",
        "No memorization was measured: <code>weftrain memorize RUN</code>",
        "No step was logged",
        "No checkpoint was entered",
        "The run has no ledger.jsonl",
    ):
        assert words in page
    with pytest.raises(RunFolderError, match="name the folder of a run"):
        report_of(tmp_path)


def test_a_run_without_a_ledger_still_has_its_curves_and_marks(eventful: Made) -> None:
    (eventful.run / LEDGER).unlink()
    report = report_of(eventful.run)
    assert [(mark.kind, mark.step) for mark in report.marks] == [("restart", 6), ("skip", 9), ("restart", 12)]
    assert [trace.left for trace in report.loss] == [
        None,
        "made again after the restart at step 6",
        "made again after the restart at step 12",
    ]
    assert "made before there was one" in page_of(eventful.run)


# Curves


def test_thinning_keeps_every_spike_and_both_ends() -> None:
    points = [(step, math.sin(step / 900)) for step in range(100_000)]
    points[31_416] = (31_416, 50.0)
    points[31_417] = (31_417, -50.0)
    points[99_990] = (99_990, 7.0)
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS
    assert {points[0], points[-1], (31_416, 50.0), (31_417, -50.0), (99_990, 7.0)} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]
    assert len(thinned(points[: MAX_POINTS + 1])) <= MAX_POINTS


def test_medians_are_those_of_their_parts() -> None:
    found = medians([(step, float(step % 10)) for step in range(1500)])
    assert len(found) == 150
    assert {value for _, value in found} == {4.5}


def paths(page: str, kind: str) -> list[str]:
    return [
        drawn for classes, drawn in re.findall(r'<path class="([^"]*)" d="([^"]*)"', page) if kind in classes.split()
    ]


def test_a_spike_in_a_long_run_is_on_the_page(tmp_path: Path) -> None:
    made = Made(tmp_path / "long", steps=20_000, chunks=None)
    lines = [
        json.dumps({"kind": "step", "time": 1.0, "step": step, "loss": 90.0 if step == 7003 else 2.0})
        for step in range(1, 20_001)
    ]
    (made.run / METRICS).write_text("\n".join(lines) + "\n")
    page = page_of(made.run)
    (raw,) = paths(page, "raw")
    places = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([0-9.]+ [0-9.]+)", raw)]
    assert len(places) <= MAX_POINTS
    top = min(places, key=lambda place: place[1])
    assert top[0] == pytest.approx(1000 * 7003 / 20_000, abs=0.06)
    assert [place for place in places if place[1] < 200] == [top]
    assert "nats a token, logarithmic" in page
    assert "greatest 90 at step 7,003" in page
    assert len(page) < 200_000


def test_a_value_that_is_not_finite_breaks_the_curve_and_is_shown() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.5), (6, 1.2)]
    figure = chart_html(Chart("Loss", "nats", [Curve("training", points)], 6))
    (line,) = paths(figure, "line")
    assert [len(re.findall("L", part)) for part in line.split("M")[1:]] == [1, 1]
    assert "step 3: training is nan" in figure
    assert "step 4: training is inf" in figure
    assert "No finite value" in chart_html(Chart("Loss", "nats", [Curve("training", [(1, math.nan)])], 6))


def test_a_broken_curve_stays_broken_when_it_is_thinned() -> None:
    points = [(step, math.nan if step == 5000 else 1.0 + step % 3) for step in range(1, 10_001)]
    (line,) = paths(chart_html(Chart("Loss", "nats", [Curve("training", points)], 10_000)), "line")
    assert line.count("M") == 2


def test_marks_in_one_place_are_one_line_that_names_each() -> None:
    marks = [Mark(5000 + number, "skip", f"words {number}") for number in range(12)] + [Mark(5003, "rollback", "back")]
    figure = chart_html(Chart("Loss", "nats", [Curve("training", [(1, 1.0), (10_000, 2.0)])], 10_000, marks))
    assert figure.count('<g class="mark') == 1
    assert '<g class="mark rollback">' in figure
    assert "step 5,007: words 7" in figure
    assert "and 5 more" in figure
    assert ">BS</span>" in figure


@pytest.mark.parametrize(
    "values", [[2.0], [0.0, 0.0], [-3.0, 5.0], [1e-300, 1.0], [1e99, -1e99], [1e300, 1.0], [5e-324, 1e-310]]
)
def test_every_axis_has_places_within_the_picture(values: list[float]) -> None:
    for from_zero in (False, True):
        points = list(enumerate(values, 1))
        figure = chart_html(Chart("Loss", "nats", [Curve("training", points)], len(points), from_zero=from_zero))
        assert "nan" not in figure.replace("is nan", "")
        for drawn in paths(figure, "line") + paths(figure, "grid"):
            assert all(-0.1 <= float(number) <= 1000.1 for number in re.findall(r"-?[0-9.]+(?:e[-+]?\d+)?", drawn))


def test_ticks_are_round_and_within() -> None:
    assert even_ticks(0, 40_000, 6) == [0, 10_000, 20_000, 30_000, 40_000]
    assert even_ticks(2.03, 2.31, 5) == pytest.approx([2.1, 2.2, 2.3])
    assert even_ticks(1.0, 1.0, 5) == [1.0]


# A stranger's record


class Markup(HTMLParser):
    """Every tag with its attributes, and whether all of them are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


ALLOWED_TAGS = {
    *(
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "footer",
        "h1",
        "h2",
        "h3",
        "p",
    ),
    *("span", "b", "i", "a", "code", "time", "ul", "ol", "li", "dl", "dt", "dd", "div", "figure", "figcaption"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "svg", "g", "path", "rect"),
}


def check_markup(page: str) -> Markup:
    markup = Markup(page)
    assert markup.open == []
    assert {tag for tag, _ in markup.tags} <= ALLOWED_TAGS
    for _, attributes in markup.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action", "formaction")
        ]
    for attributes in markup.all("a"):
        assert re.match(r"(#[a-z]+|\.{1,2}/.*/)$", attributes["href"] or ""), attributes
    policies = [one["content"] for one in markup.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    return markup


HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)' \u202e\x00"


def hostile_run(folder: Path) -> Made:
    made = Made(folder / "<img src=x onerror=alert(4)>&quot;")
    made.json = {**made.json, "description": HOSTILE}
    (made.run / "recipe.json").write_bytes(canonical_json(made.json) + b"\n")
    made.environment = {
        HOSTILE: HOSTILE,
        "backend": HOSTILE,
        "device": HOSTILE,
        "weftrain": HOSTILE,
        "kernels": {"ops": {HOSTILE: []}},
    }
    made.go(0, 12, save=[6, 12])
    made.roll_back(6, 1, HOSTILE)
    made.ledger.add("defer", step=6, chunk=2, action="defer", reason=HOSTILE)
    made.ledger.add("recipe", step=6, changes=[[HOSTILE, None, HOSTILE]], recipe=made.json, recipe_sha256="0" * 64)
    made.environment = {**made.environment, HOSTILE: 1}
    made.go(6, 9)
    made.metric("evaluation", step=9, set=HOSTILE, loss=2.0)
    made.metric("evaluation", step=9, set="\ud800", loss=2.0)
    made.metric("step", step=10, loss=1.0, learning_rate={HOSTILE: 1.0})
    evaluate(made.run, 9, HOSTILE, "task", task=HOSTILE, metric=HOSTILE, task_version=HOSTILE)
    memorize(made.run, 6, made.roots[6], "chunk_00000", [1], 6)
    return made


def test_a_stranger_s_words_stay_words(tmp_path: Path) -> None:
    run = hostile_run(tmp_path).run
    report = collect(run, lambda recipe: [f"{HOSTILE}  {HOSTILE}"])
    page = page_html(report, run)
    markup = check_markup(page)
    page.encode()
    assert page.count("&lt;script&gt;alert(1)") > 10
    assert "\u202e" not in page
    assert "\\u202e" in page
    assert list(markup.all("script")) == list(markup.all("img")) == []


ODD_JSON: list[Any] = [None, "x", [[1]], {"a": {"b": [1]}}, -1, 10**60]


def refusal_of(run: Path) -> str | None:
    """What is said instead of a page; None where there is one, which is checked."""
    try:
        check_markup(page_of(run))
    except RunFolderError as error:
        return str(error)
    return None


def test_a_ledger_of_odd_types_is_refused_by_line_and_key(eventful: Made) -> None:
    """Its chain is right: whoever wrote it wrote it so."""
    entries = [parse_json(line) for line in (eventful.run / LEDGER).read_bytes().splitlines()]
    keys = sorted({key for entry in entries for key in entry} - {"n", "previous", "hash", "kind", "step"})
    pages = []
    for key, odd in itertools.product(keys, ODD_JSON):
        lines, previous = [], None
        for entry in entries:
            changed = {**entry, "previous": previous} | ({key: odd} if key in entry else {})
            del changed["hash"]
            changed["hash"] = previous = sha256_json(changed)
            lines.append(canonical_json(changed))
        (eventful.run / LEDGER).write_bytes(b"\n".join(lines) + b"\n")
        refusal = refusal_of(eventful.run)
        assert refusal is None or re.search(rf"{LEDGER}:\d+: (key '{key}|resumes from checkpoint)", refusal), (
            key,
            odd,
            refusal,
        )
        if refusal is None:
            pages.append((key, odd))
    assert ("environment", {"a": {"b": [1]}}) in pages
    assert ("reason", "x") in pages
    assert not {key for key, _ in pages} & {
        "root",
        "parent",
        "branch",
        "samples",
        "time",
        "abandoned",
        "recipe_sha256",
        "metrics_sha256",
    }


def test_metrics_of_odd_types_are_refused_by_line_and_key(eventful: Made) -> None:
    path = eventful.run / METRICS
    before = path.read_bytes()
    keys = (
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "tokens_per_second",
        "skipped",
        "peak_flops",
        "flops_per_token",
        "time",
    )
    refused = 0
    for key, odd in itertools.product(keys, ("null", '"x"', "[]", '{"a": 1}', "true", "-1", "1e308", "1" + "0" * 400)):
        values = f'"{key}": {odd}' + ("" if key == "loss" else ', "loss": 2.0')
        lines = [f'{{"kind": "{kind}", "step": 20, "set": "x", {values}}}' for kind in ("step", "evaluation", "end")]
        path.write_bytes(before + "\n".join(lines).encode() + b"\n")
        refusal = refusal_of(eventful.run)
        assert refusal is None or re.search(rf"{METRICS}:\d+: not a metrics line: .*{key}", refusal), (
            key,
            odd,
            refusal,
        )
        refused += refusal is not None
    # -1 and 1e308 are numbers, {"a": 1} rates, true a skip, null no peak
    assert refused == 6 + 6 + 7 + 8 + 6 + 7 + 5 + 6 + 8
    path.write_bytes(before + b'{"kind": "evaluation", "step": 20, "set": []}\n')
    with pytest.raises(RunFolderError, match="not a metrics line"):
        report_of(eventful.run)


def test_links_are_relative_and_never_a_scheme(tmp_path: Path) -> None:
    target = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert relative_link(target, tmp_path / "run") == "./checkpoints/step_00000002/"
    assert relative_link(target, tmp_path / "pages") == "../run/checkpoints/step_00000002/"
    assert relative_link(tmp_path / "javascript:alert(1)" / "x", tmp_path) == "./javascript%3Aalert%281%29/x/"


def test_hidden_characters_are_made_visible() -> None:
    assert escape("a\u202eb\x1b\ud800<&'\"\n") == "a\\u202eb\\u001b\\ud800&lt;&amp;&#x27;&quot;\n"


# How it reads


def test_the_page_is_in_order(eventful: Made) -> None:
    memorize(eventful.run, 6, eventful.roots[6], "chunk_00000", [1], 6)
    evaluate(eventful.run, 6, eventful.roots[6], "copa")
    markup = check_markup(page_of(eventful.run))
    levels = [int(tag[1]) for tag, _ in markup.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert len(list(markup.all("caption"))) == len(list(markup.all("table"))) == 4
    pictures = list(markup.all("svg"))
    assert len(pictures) == 4
    assert all(one["role"] == "img" and len(one["aria-label"] or "") > 30 for one in pictures)
    assert all(one.get("scope") in ("row", "col") for one in markup.all("th"))
    identities = [attributes["id"] for _, attributes in markup.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    targets = {(one["href"] or "")[1:] for one in markup.all("a") if (one["href"] or "").startswith("#")}
    assert targets <= set(identities)
    assert next(markup.all("html"))["lang"] == "en"


def luminance(colour: Sequence[float]) -> float:
    """WCAG 2: of sRGB in 0..1."""
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_sufficient_in_light_and_dark() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    for scheme in (light, dark):
        colours = {
            name: [int(value[index : index + 2], 16) / 255 for index in (0, 2, 4)]
            for name, value in re.findall(r"--([a-z0-9-]+): #([0-9a-f]{6})", scheme)
        }
        for ground in ("paper", "card"):
            for ink in ("ink", "soft", "c0", "restart", "rollback", "skip", "recipe", "defer"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
            for curve in ("c1", "c2", "c3", "c4", "c5"):
                assert contrast(colours[curve], colours[ground]) >= 3, (curve, ground)
        heated = [0.55 * heat + 0.45 * card for heat, card in zip(colours["heat"], colours["card"], strict=True)]
        assert contrast(colours["ink"], heated) >= 4.5
        assert contrast(colours["ink"], colours["changed"]) >= 4.5


def test_a_long_run_is_kept_as_numbers_alone(tmp_path: Path) -> None:
    """Sixteen bytes a point, and some room for growing: a record as a dict takes a kilobyte."""
    made = Made(tmp_path / "long", steps=20_000, chunks=None)
    step = '{"kind": "step", "time": 1.0, "step": %d, "loss": 2.5, "grad_norm": 1, "tokens_per_second": 9, "learning_rate": {"a": 1}}\n'
    (made.run / METRICS).write_text("".join(step % number for number in range(1, 6001)))
    tracemalloc.start()
    try:
        curves = read_curves(made.run, [])
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [
        len(one.points) for key in ("loss", "grad_norm", "tokens_per_second") for one in curves.traces(key, key)
    ] == [6000] * 3
    assert size < 6000 * 120
    assert peak < 6000 * 180


def test_very_many_checkpoints_are_shown_from_both_ends(eventful: Made) -> None:
    report = report_of(eventful.run)
    page = page_html(replace(report, checkpoints=report.checkpoints * 1000), eventful.run)
    assert f"of which {len(report.checkpoints) * 1000 - 3000:,} in the middle are not shown" in page
    assert page.count('<th scope="row" class="n">') < 3200
