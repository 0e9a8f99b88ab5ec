"""Curves of a run: what counts, what was left, and what is refused."""

from __future__ import annotations

import itertools
import math
import re
import tracemalloc
from pathlib import Path

import pytest
from made_runs import Made, page_of, refusal_of, report_of

from weftrain.analysis.report import collect as collected
from weftrain.analysis.report import curves
from weftrain.analysis.report.curves import read_curves
from weftrain.analysis.report.summary import summarize
from weftrain.core.errors import RunFolderError
from weftrain.core.run import step_lines
from weftrain.core.run.metrics import METRICS, read_metrics


def test_what_was_left_is_apart_from_what_counts(eventful: Made) -> None:
    report = report_of(eventful.run)
    own, lost, branch = report.loss
    kept = [(one["step"], one["loss"]) for one in read_metrics(eventful.run) if one["kind"] == "step"]
    assert [step for step, _ in own.points] == list(range(1, 25)) == [step for step, _ in kept]
    assert [value for step, value in own.points if step != 9] == [value for step, value in kept if step != 9]
    assert math.isnan(dict(own.points)[9])
    assert ([step for step, _ in lost.points], lost.abandoned) == ([7, 8], "made again after the restart at step 6")
    assert [step for step, _ in branch.points] == [13, 14, 15, 16, 17, 18]
    assert branch.abandoned == "branch 1, abandoned by the rollback to step 12: the loss rose"
    held = [(curve.name, curve.abandoned is None, [step for step, _ in curve.points]) for curve in report.heldout]
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
    assert [(step, curve.abandoned) for curve in report.loss[1:] for step, _ in list(curve.points)[:1]] == [
        (7, "branch 2, abandoned by the rollback to step 6: then further")
    ]
    assert report.status == "not finished: 6 of 24 steps done"


def test_p50_is_the_summary_s(eventful: Made) -> None:
    summary = summarize(eventful.run)
    assert summary is not None
    throughput = next(one for one in report_of(eventful.run).metrics if one.chart.key == "tokens_per_second")
    assert throughput.median == summary.tokens_per_second
    assert f"median {summary.tokens_per_second:,.5g}" in page_of(eventful.run)


def test_an_entry_in_the_table_of_charts_draws_a_figure(eventful: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    charts = (*curves.METRIC_CHARTS, curves.MetricChart("words", "Words", "none", "words"))
    monkeypatch.setattr(curves, "METRIC_CHARTS", charts)
    monkeypatch.setattr(collected, "METRIC_CHARTS", charts)
    lines = eventful.run / "metrics.jsonl"
    before = lines.read_text()
    try:
        lines.write_text(before.replace('"kind": "step",', '"kind": "step", "words": 7,'))
        metric = report_of(eventful.run).metrics[-1]
        assert set(metric.curves[0].points.values.tolist()) == {7.0}
        lines.write_text(before.replace('"kind": "step",', '"kind": "step", "words": "seven",'))
        assert report_of(eventful.run).metrics[-1].curves == ()
    finally:
        lines.write_text(before)


def test_equal_learning_rates_are_one_curve(eventful: Made) -> None:
    assert [curve.name for curve in report_of(eventful.run).learning_rate] == ["embeddings, norms", "matrices"]


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


def test_a_long_run_is_kept_as_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen bytes a point, and some room for growing: a record as a dict takes a kilobyte."""
    monkeypatch.setattr(step_lines, "_BLOCK_BYTES", 1 << 14)
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
        len(one.points) for key in ("loss", "grad_norm", "tokens_per_second") for one in curves.logged(key, key)
    ] == [6000] * 3
    assert size < 6000 * 120
    assert peak < 6000 * 180
