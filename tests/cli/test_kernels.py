"""`weftrain kernels`: the table, and check, compile and bench as a user calls them; what they compute has tests of its
own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from weftrain.cli import kernel_parts
from weftrain.cli.kernels_bench import bench_table, machine_lines
from weftrain.kernels import OPS, checks, load_catalog
from weftrain.kernels.bench import measure
from weftrain.kernels.bench.report import KernelBenchReport, Measurement, RefusedExample, SkippedExample
from weftrain.kernels.bench.roofline import Machine, Rate
from weftrain.kernels.checks import CheckReport, Finding


def test_the_table_has_every_op_and_source(weftrain: Callable[..., Result]) -> None:
    result = weftrain("kernels", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    found = {(row["op"], row["source"], row["device"]) for row in document["rows"]}
    assert found == {
        (op, source, device)
        for op, sources in load_catalog().items()
        for source in sources
        for device in ("cpu", "cuda")
    }
    reasons = {(row["op"], row["source"]): row["reason"] for row in document["rows"] if row["device"] == "cpu"}
    assert reasons["swiglu", "torch"] is None
    assert "not cpu" in reasons["attention", "flash_attn"]
    assert document["preferences"][0] == "flash_attn"
    assert document["preferences_on_gpu"][1] == "triton"


def test_the_table_says_why_not(weftrain: Callable[..., Result]) -> None:
    output = weftrain("kernels", "--device", "cpu", "--dtype", "float32").output
    lines = output.splitlines()
    (row,) = (line for line in lines if line.split()[:1] == ["flash_attn"])
    number = row.split()[-1]
    assert number.startswith("(")
    assert any(line.startswith(f"{number} needs an NVIDIA GPU, not cpu") for line in lines)
    assert sum(line.startswith(op) for op in OPS for line in lines) >= len(OPS)
    assert "cuda" not in lines[0]


# ---- check
# ----------------------------------------------------------------------------------------------------


def test_check_passes_and_writes_what_it_found(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    options = [
        "--op",
        "swiglu",
        "--source",
        "torch",
        "--dtype",
        "float32",
        "--check",
        "numerics",
        "--json",
        tmp_path / "f.json",
    ]
    result = weftrain("kernels", "check", *options)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "f.json").read_text())
    assert document["schema_version"] == 1
    assert {(item["op"], item["source"], item["check"], item["dtype"]) for item in document["findings"]} == {
        ("swiglu", "torch", "numerics", "float32")
    }
    count = len(document["findings"])
    assert f"swiglu  torch   {count}/{count}" in result.output
    assert f"{count} passed, 0 failed" in result.output


def test_a_failed_check_is_named_and_the_exit_code_says_so(
    weftrain: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = CheckReport()
    report += [
        Finding("rope", "ours", "numerics", "odd", "float32", True, "fine"),
        Finding("rope", "ours", "numerics", "edge", "float32", False, "x is off by 0.1"),
    ]
    report.skipped.append(checks.SkippedCase("rope", "theirs", "*", "*", "float32", "needs a tape drive"))
    asked: dict[str, Any] = {}

    def run_checks(
        ops: Any, sources: Any, device: Any, dtypes: Any, names: Any, progress: Any, *, found: Any, **how: Any
    ) -> CheckReport:
        asked.update(ops=ops, sources=sources, device=device, dtypes=dtypes, names=names, **how)
        progress(1, 2, "rope ours")
        for finding in report:
            found(finding)
        return report

    monkeypatch.setattr(checks, "run_checks", run_checks)
    result = weftrain(
        "kernels", "check", "--op", "rope", "--source", "ours", "--source", "theirs", "--dtype", "float16", "--thorough"
    )
    assert result.exit_code == 1
    assert asked == {
        "ops": ("rope",),
        "sources": ("ours", "theirs"),
        "device": "cpu",
        "dtypes": (torch.float16,),
        "names": None,
        "thorough": True,
        "limit_s": 120.0,
    }
    assert "failed rope ours numerics edge float32: x is off by 0.1" in result.output  # when it was found
    assert "FAILED rope ours numerics edge float32: x is off by 0.1" in result.output
    assert "1/2 FAILED" in result.output
    assert "skipped rope theirs: needs a tape drive" in result.output
    assert "1 passed, 1 failed, 1 skipped" in result.output


def test_checking_nothing_is_no_success(weftrain: Callable[..., Result]) -> None:
    result = weftrain("kernels", "check", "--source", "apex", "--check", "numerics")
    assert result.exit_code == 1
    assert "nothing was checked" in result.output
    assert "needs an NVIDIA GPU, not cpu" in result.output


def test_unknown_names_are_one_line(weftrain: Callable[..., Result]) -> None:
    for arguments in (
        ("check", "--op", "ropee"),
        ("bench", "--op", "ropee"),
        ("bench", "--source", "tortch"),
        ("compile", "--op", "ropee"),
    ):
        result = weftrain("kernels", *arguments)
        assert result.exit_code == 2, result.output
        assert result.output.startswith("weftrain: "), result.output
        assert result.output.count("\n") == 1


@pytest.mark.parametrize("verb", ["check", "bench"])
def test_interpret_starts_another_process(
    verb: str, weftrain: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[tuple[list[str], str | None]] = []

    class Done:
        returncode = 7

    def run(command: list[str], *, env: dict[str, str], check: bool) -> Done:
        started.append((command[1:], env.get("TRITON_INTERPRET")))
        return Done()

    monkeypatch.setattr(kernel_parts.subprocess, "run", run)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = weftrain(
        "kernels", verb, "--interpret", "--op", "rope", "--source", "triton", "--json", tmp_path / "x.json"
    )
    assert result.exit_code == 7
    ((command, interpret),) = started
    assert interpret == "1"
    assert command[:8] == ["-m", "weftrain.cli", "kernels", verb, "--op", "rope", "--source", "triton"]
    assert command[-2:] == ["--json", str(tmp_path / "x.json")]
    assert verb == "bench" or command[8:10] == ["--limit", "600"]
    assert "--interpret" not in command
    assert weftrain("kernels", verb, "--interpret", "--device", "cuda").exit_code == 2


def test_check_under_the_interpreter(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    """For real: bf16 of the interpreter mended, a Triton kernel run on the CPU."""
    pytest.importorskip("triton")
    options = [
        "--op",
        "swiglu",
        "--source",
        "triton",
        "--dtype",
        "bfloat16",
        "--check",
        "numerics",
        "--json",
        tmp_path / "f.json",
    ]
    result = weftrain("kernels", "check", "--interpret", *options)
    assert result.exit_code == 0
    findings = json.loads((tmp_path / "f.json").read_text())["findings"]
    assert findings
    assert all(item["ok"] and item["source"] == "triton" and item["dtype"] == "bfloat16" for item in findings)


# ---- compile
# ----------------------------------------------------------------------------------------------------


def test_compile_and_diff(weftrain: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from weftrain.kernels.checks import compile_gate
    from weftrain.kernels.checks.compile_gate import Row

    figures = {
        "registers": 64,
        "spill_instructions": 0,
        "shared_bytes": 2048,
        "shared_limit_bytes": 166912,
        "binary_bytes": 4096,
    }
    fine = Row(
        "rope",
        "triton",
        "forward",
        "sm_80",
        True,
        True,
        None,
        None,
        matrix_instruction="HMMA",
        matrix_instruction_count=8,
        loop_matrix_instructions=4,
        loop_instructions=90,
        wide_share=0.875,
        blocks_per_multiprocessor=3,
        **figures,
    )
    excluded = Row("rope", "triton", "wide", "gfx942", False, True, None, "needs 80 KiB of 64 KiB")
    candidate = Row("rope", "triton", "wide", "sm_80", False, False, "spills 12 bytes", None)
    rows = [fine, excluded, candidate]
    asked: list[Any] = []

    def compile_all(*arguments: Any) -> list[Row]:
        asked.append(arguments[:5])
        arguments[5](1, 3, "rope forward sm_80")
        return rows

    monkeypatch.setattr(compile_gate, "compile_all", compile_all)
    result = weftrain(
        "kernels", "compile", "--op", "rope", "--target", "sm_80", "--defaults-only", "--json", tmp_path / "old.json",
        "--record", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output  # a candidate that fails is no failure
    assert asked == [(None, ("rope",), None, ("sm_80",), False)]
    assert "3 configurations x targets: 0 failed, 1 candidates fail, 1 excluded" in result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("rope  triton  forward"))
    assert line.split() == [
        "rope",
        "triton",
        "forward",
        "sm_80",
        "ok",
        "64",
        "0",
        "2.0",
        "/",
        "163",
        "3",
        "88%",
        "8",
        "HMMA",
        "4",
        "of",
        "90",
        "4.0",
    ]
    assert "candidate fails rope triton wide sm_80: spills 12 bytes" in result.output
    rows[0] = replace(fine, blocks_per_multiprocessor=2)
    result = weftrain("kernels", "compile", "--against", tmp_path / "figures.json")
    assert result.exit_code == 1
    assert "SLOWER rope triton forward sm_80: blocks a multiprocessor 3 -> 2" in result.output
    rows[0] = fine
    assert weftrain("kernels", "compile", "--against", tmp_path / "figures.json").exit_code == 0
    (tmp_path / "figures.json").write_text('{"schema_version": 0}')
    assert "another version" in str(weftrain("kernels", "compile", "--against", tmp_path / "figures.json").output)
    rows[0] = Row(
        "rope", "triton", "forward", "sm_80", True, False, "spills 16 bytes", None, registers=255, spill_instructions=4
    )
    result = weftrain("kernels", "compile", "--diff", tmp_path / "old.json")
    assert result.exit_code == 1
    assert "FAILED rope triton forward sm_80: spills 16 bytes" in result.output
    assert "64 -> 255" in result.output
    missing = weftrain("kernels", "compile", "--diff", tmp_path / "none.json")
    assert missing.exit_code == 2
    assert "none.json" in missing.output


# ---- bench
# ----------------------------------------------------------------------------------------------------


def measurement(**changes: Any) -> Measurement:
    given: dict[str, Any] = {
        "op": "rope",
        "example": "amber_7b",
        "source": "reference",
        "version": "torch 2",
        "dtype": "bfloat16",
        "direction": "forward",
        "median_ms": 4.0,
        "low_ms": 3.5,
        "high_ms": 4.5,
        "confidence": 0.97,
        "samples": 20,
        "bytes": 1,
        "flops": 1,
        "gb_per_second": 12.5,
        "gflop_per_second": 3.25,
        "ideal_ms": 1.0,
        "bound": "memory",
        "roofline_share": 0.25,
        "sourced_roofline_share": None,
        "copies": 4,
        "working_set_bytes": 1,
        "beyond_cache": True,
    }
    return Measurement(**given | changes)


ENVIRONMENT = {
    "device": "a CPU",
    "device_type": "cpu",
    "threads": 2,
    "cpu_capability": "AVX512",
    "torch": "2.13.0",
    "dtype": "bfloat16",
    "suite": "7b",
    "measured_peak_gflop_per_second": 400.0,
    "measured_peak_origin": "measured",
    "measured_bandwidth_gb_per_second": 20.0,
    "measured_bandwidth_origin": "copy",
    "sourced_peak_gflop_per_second": None,
    "sourced_peak_origin": "no sheet",
    "sourced_bandwidth_gb_per_second": None,
    "sourced_bandwidth_origin": "no sheet",
    "cache_bytes": 32 * 2**20,
    "cache_origin": "largest",
}


def cells(report: KernelBenchReport) -> list[list[str]]:
    table = bench_table(report)
    return [[str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_every_printed_figure() -> None:
    fast = measurement(
        source="ours",
        median_ms=1.6,
        low_ms=1.5,
        high_ms=1.75,
        roofline_share=0.625,
        launch_ms=0.03125,
        peak_bytes=1536 * 2**20,
    )
    few = measurement(source="triton", confidence=0.75, roofline_share=None, note="plumbing only", bound=None)
    eager, ours, plumbing = cells(KernelBenchReport(ENVIRONMENT, [measurement(), fast, few]))
    assert eager == [
        *(
            "rope",
            "amber_7b",
            "forward",
            "reference (torch eager)",
            "4",
            "3.5 - 4.5",
            "1.00",
            "-",
            "-",
            "12.5",
            "3.25",
            "25.0%",
            "memory",
            "",
        )
    ]
    assert ours[3:12] == ["ours", "1.6", "1.5 - 1.75", "2.50", "0.0312", "1,536", "12.5", "3.25", "62.5%"]
    assert plumbing[5] == "3.5 - 4.5 (75%)"
    assert plumbing[11:] == ["unknown", "-", "plumbing only"]
    assert cells(KernelBenchReport(ENVIRONMENT, [fast]))[0][6] == "-"  # no eager row to compare with


def test_the_machine_is_described() -> None:
    within = measurement(op="swiglu", example="odd", copies=4096, beyond_cache=False)
    lines = machine_lines(KernelBenchReport(ENVIRONMENT, [measurement(), within]))
    assert lines == [
        "a CPU, 2 threads, AVX512, torch 2.13.0, bfloat16, suite 7b",
        "peak       400.0 GFLOP/s (measured); data sheet: unknown (no sheet)",
        "bandwidth  20.0 GB/s (copy); data sheet: unknown (no sheet)",
        "cache      0.0312 GiB (largest); inputs in 4 to 4,096 copies, used in turn; still within the cache: swiglu odd",
    ]
    assert (
        "overwritten before each sample"
        in machine_lines(KernelBenchReport({**ENVIRONMENT, "device_type": "cuda"}, []))[3]
    )


def test_bench_writes_json_and_a_plot(
    weftrain: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    asked: list[Any] = []

    def bench(*arguments: Any, progress: Any, recorded: Any) -> KernelBenchReport:
        assert recorded is None
        asked.append((*arguments, torch.get_num_threads()))
        progress(0, 1, "rope")
        return KernelBenchReport(
            ENVIRONMENT, [measurement()], [SkippedExample("rope", "amber_7b", "apex", "needs a tape drive")]
        )

    monkeypatch.setattr(measure, "bench", bench)
    options = ["--op", "rope", "--suite", "7b", "--dtype", "float32", "--threads", "1", "--repeats", "9"]
    result = weftrain("kernels", "bench", *options, "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    assert result.exit_code == 0, result.output
    assert asked == [(("rope",), None, "7b", torch.float32, "cpu", 9, 1)]
    assert json.loads((tmp_path / "b.json").read_text())["measurements"][0]["median_ms"] == 4.0
    assert (tmp_path / "b.png").stat().st_size > 1000
    assert "not measured: rope amber_7b apex: needs a tape drive" in result.output
    assert "reference (torch eager)" in result.output
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    result = weftrain("kernels", "bench", *options, "--json", tmp_path / "c.json", "--plot", tmp_path / "c.png")
    assert result.exit_code == 0
    assert (tmp_path / "c.json").exists()
    assert not (tmp_path / "c.png").exists()
    assert "reference (torch eager)" in result.output
    assert "nothing is drawn without matplotlib" in result.output


def test_what_was_refused_or_too_fast_is_said_and_fails(
    weftrain: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = RefusedExample("rope", "amber_7b", "quick", "forward", "cached output", "two samples are the same")
    reports = [
        (
            KernelBenchReport(ENVIRONMENT, [measurement()], refused=[refused]),
            "REFUSED rope amber_7b quick forward: cached",
        ),
        (KernelBenchReport(ENVIRONMENT, [measurement(error="faster than", note="x")]), "ERROR: faster than; x"),
    ]
    for report, words in reports:
        monkeypatch.setattr(measure, "bench", lambda *_, report=report, **__: report)
        result = weftrain("kernels", "bench", "--op", "rope")
        assert result.exit_code == 1
        assert words in result.output


def test_bench_for_real(weftrain: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rate = Rate(1e15, "known in tests", "B")
    monkeypatch.setattr(measure, "measure_machine", lambda *_: Machine(rate, rate, rate, rate, 2**20, "", "cpu"))
    options = ["--op", "swiglu", "--source", "torch", "--source", "reference", "--repeats", "3"]
    result = weftrain("kernels", "bench", *options, "--json", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "b.json").read_text())
    assert {(item["source"], item["direction"]) for item in document["measurements"]} == {
        (source, direction)
        for source in ("torch", "reference")
        for direction in ("forward", "forward+backward", "backward")
    }
    assert all(0 < item["low_ms"] <= item["median_ms"] <= item["high_ms"] for item in document["measurements"])
