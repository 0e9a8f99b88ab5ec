"""Every page of a report says what the report says."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from weftrain.analysis.bench.pages import csv_text, flat, html_page, markdown, mllog_lines, write_report
from weftrain.analysis.bench.report import (
    BenchReport,
    read_report,
)


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


def test_a_page_begins_with_machine_result_and_interval(report: BenchReport) -> None:
    page = html_page(report, b"light", b"dark")
    places = [page.index(word) for word in (">machine<", ">result<", ">95 % interval<", "<h2>")]
    assert places == sorted(places)
    assert f">{report.speed.tokens_per_second:,.0f} tokens/s<" in page
    assert "prefers-color-scheme: dark" in page
    assert "MiB" not in page
    parameters = report.shape["parameters"]
    assert f"<td>{parameters:,}</td>" in page


def test_without_matplotlib_the_work_is_kept(
    report: BenchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    paths = {path.name for path in write_report(report, tmp_path)}
    assert paths == {"report.json", "report.md", "report.csv", "report.html"}
    assert read_report(tmp_path) == report
    assert "<img" not in (tmp_path / "report.html").read_text()


def test_mllog(report: BenchReport) -> None:
    lines = list(mllog_lines(report, 1, 2))
    assert all(line.startswith(":::MLLOG {") for line in lines)
    entries = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    assert [entry["key"] for entry in entries][-3:] == ["run_start", "tracked_stats", "run_stop"]
    assert entries[-1]["metadata"]["status"] == "success"
    assert entries[-2]["value"]["throughput"] == pytest.approx(report.speed.tokens_per_second / 32)
