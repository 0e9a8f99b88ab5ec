"""A benchmark report as Markdown, a CSV row, plots, one HTML page, and MLPerf result lines.

Every number is a field of report.json; nothing is computed here, so no page can contradict another.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weftrain.analysis.bench.compare import device_of, machine_of
from weftrain.analysis.bench.report import STEP_PARTS, BenchReport, Efficiency
from weftrain.analysis.figure import NoMatplotlibError, colours, new_figure, picture
from weftrain.analysis.markup import document, escape
from weftrain.core.formats import fsops
from weftrain.core.formats.units import gib

_COLOURS = (
    "#4269d0",
    "#97bbf5",
    "#3ca951",
    "#ff725c",
    "#6cc5b0",
    "#efb118",
    "#a463f2",
    "#9c6b4e",
    "#9498a0",
    "#d0d3d8",
)


def _share(value: float | str | None) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.1%}"


def _rate(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value / 1e12:,.3f} TFLOP/s"


Rows = list[tuple[str, str]]


def tables(report: BenchReport) -> Iterator[tuple[str, Rows]]:
    """(title, rows of name and value) of each section."""
    yield "Speed", _speed_rows(report)
    yield "Efficiency", _efficiency_rows(report.efficiency)
    total = sum(report.breakdown_ms.values())
    parts = [(part, f"{value:,.2f} ms, {value / total:.1%}") for part, value in report.breakdown_ms.items()]
    yield f"A step of {total:,.2f} ms", [*parts, ("note", report.breakdown_note)]
    yield "Memory", [(key.replace("_", " "), _bytes(value)) for key, value in report.memory.items()]
    if figures := report.backend_stats.items():
        shown = ((key, f"{value:.1%}" if key.endswith("_share") else f"{value:,.1f}") for key, value in figures)
        yield "Figures of the backend", list(shown)
    yield "Energy", [("energy", _energy(report))]
    verdict = {True: "passed", False: "FAILED", None: "not checked"}[report.correctness.passed]
    yield "Correctness", [("verdict", verdict), ("compared", report.correctness.words)]
    yield "Shape", _rows(report.shape)
    ops = sorted(report.kernels.get("ops", {}).items())
    kernels = [(op, ", ".join(sorted({entry["source"] for entry in entries}))) for op, entries in ops]
    yield "Kernels", kernels or [("none", "-")]
    yield "Identity", _rows({key: value for key, value in report.identity.items() if key != "recipe"})
    yield "Environment", _rows(report.environment)


def _speed_rows(report: BenchReport) -> Rows:
    speed, rounds = report.speed, len(report.rounds)
    interval = f"95 %: {speed.step_ms_p50_low:,.2f} to {speed.step_ms_p50_high:,.2f}"
    spread = (speed.step_ms_min, speed.step_ms_p90, speed.step_ms_p99, speed.step_ms_mean)
    return [
        ("tokens/s", f"{speed.tokens_per_second:,.1f}"),
        ("tokens/s a device", f"{speed.tokens_per_second_per_device:,.1f}"),
        ("step, median", f"{speed.step_ms_p50:,.2f} ms ({interval})"),
        ("step, min / p90 / p99 / mean", " / ".join(f"{value:,.2f}" for value in spread) + " ms"),
        ("variation", f"{speed.step_ms_variation:.1%}"),
        ("steps", f"{speed.counted_steps} in {rounds} rounds, each after {speed.warm_up_steps} warm-up steps"),
        ("compilation and first step", f"{speed.compile_s:,.2f} s"),
    ]


def _efficiency_rows(found: Efficiency) -> Rows:
    measured = f"{_share(found.mfu_measured)} of {_rate(found.measured_peak_flops)} ({found.measured_peak_origin})"
    sourced = f"{_share(found.mfu_sourced)} of {_rate(found.sourced_peak_flops)} ({found.sourced_peak_origin})"
    rows = [
        ("FLOP/s", _rate(found.flops_per_second)),
        ("FLOPs a token", f"{found.flops_per_token:,} = {found.flops_formula}"),
        ("MFU, measured peak", measured),
        ("MFU, data sheet", sourced),
    ]
    if found.hfu_measured is not None:
        rows.append(("HFU, measured peak", f"{_share(found.hfu_measured)}, recomputation included"))
    return rows


def _energy(report: BenchReport) -> str:
    joules, source = report.energy["joules"], report.energy["source"]
    if isinstance(joules, str):
        return f"{joules} ({source})"
    per_token_mj = joules / (report.shape["tokens_per_step"] * report.speed.counted_steps) * 1e3
    return f"{joules:,.1f} J, {per_token_mj:,.3f} mJ a token ({source})"


def _bytes(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_bytes(part)}" for key, part in value.items())
    return gib(value) if isinstance(value, int | float) else str(value)


def _plain(value: Any) -> str:
    """A value of the report for people: thousands apart, four significant digits, yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items()) or "-"
    return ", ".join(map(_plain, value)) or "-" if isinstance(value, list) else str(value)


def _rows(mapping: Mapping[str, Any]) -> Rows:
    """Named values; a size in bytes is told in GiB."""
    shown = ((key, gib(value) if key == "memory_bytes" else _plain(value)) for key, value in mapping.items())
    return [(key.removesuffix("_bytes").replace("_", " "), value) for key, value in shown]


def headline(report: BenchReport) -> Rows:
    """What a page begins with: the machine, the result and its interval."""
    speed, per_step = report.speed, report.shape["tokens_per_step"] * 1e3
    device = device_of(report)
    machine = machine_of(report) if device == "CPU" else f"{device}; {machine_of(report)}"
    interval = f"{per_step / speed.step_ms_p50_high:,.0f} to {per_step / speed.step_ms_p50_low:,.0f}"
    mfu = report.efficiency.mfu_measured
    return [
        ("machine", machine),
        ("result", f"{speed.tokens_per_second:,.0f} tokens/s"),
        ("95 % interval", f"{interval} tokens/s, {speed.counted_steps} steps in {len(report.rounds)} rounds"),
        ("MFU", f"{_share(mfu)} of the peak measured here"),
    ]


def markdown(report: BenchReport) -> str:
    table = [f"| {name} | {value.replace('|', '/')} |" for name, value in headline(report)]
    lines = [f"# {report.name}", "", "| | |", "|---|---|", *table, "", f"{report.made_at}", ""]
    lines += [f"> warning: {warning}" for warning in report.warnings] + [""]
    for title, rows in tables(report):
        table = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows]
        lines += [f"## {title}", "", "| | |", "|---|---|", *table, ""]
    return "\n".join(lines)


def flat(report: BenchReport) -> dict[str, Any]:
    """The values of one row in a table of benchmarks."""
    row: dict[str, Any] = {"name": report.name, "made_at": report.made_at}
    row |= {key: report.identity[key] for key in ("commit", "dirty")}
    shape = ("backend", "devices", "compute", "global_batch_size", "micro_batch_size", "sequence_length")
    row |= {key: report.shape[key] for key in shape}
    row |= report.speed.model_dump()
    row |= report.efficiency.model_dump(include={"mfu_measured", "mfu_sourced", "hfu_measured", "flops_per_second"})
    row |= {f"{part.replace(' ', '_')}_ms": round(report.breakdown_ms.get(part, 0.0), 3) for part in STEP_PARTS}
    return row | {"peak_memory_bytes": report.memory["measured_peak_bytes"], "correct": report.correctness.passed}


def csv_text(rows: list[dict[str, Any]], header: bool = True) -> str:
    buffer = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, fields)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def plots(report: BenchReport, dark: bool = False) -> bytes:
    """Step times of every round and the breakdown of the mean step, as PNG. Raises DataError without matplotlib."""
    with colours(dark):
        return _plots(report)


def _plots(report: BenchReport) -> bytes:
    figure = new_figure(10, 4.2)
    times, parts = figure.subplots(1, 2, width_ratios=(3, 1))
    for number, values in enumerate(report.rounds, 1):
        times.plot(range(1, len(values) + 1), values, ".-", linewidth=0.8, label=f"round {number}")
    times.axvspan(0.5, report.speed.warm_up_steps + 0.5, color="#d0d3d8", alpha=0.5, label="warm-up")
    times.axhspan(
        report.speed.step_ms_p50_low, report.speed.step_ms_p50_high, color="#3ca951", alpha=0.3, label="median, 95 %"
    )
    times.set_yscale("log")
    times.set_xlabel("step")
    times.set_ylabel("ms")
    times.legend(fontsize="small")
    below = 0.0
    for part, colour in zip(STEP_PARTS, _COLOURS, strict=True):
        value = max(0.0, report.breakdown_ms.get(part, 0.0))
        if value:
            parts.bar(0, value, bottom=below, color=colour, label=part)
            below += value
    parts.set_xticks([])
    parts.set_ylabel("ms of the mean step")
    parts.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{report.name}: {report.speed.tokens_per_second:,.0f} tokens/s")
    return picture(figure, dpi=130)


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
td { border-top: 1px solid #8884; padding: .25rem .5rem; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { width: 30%; color: #777; }
img { max-width: 100%; }
table.headline td { font-size: 1.25rem; }
.warning { border-left: .3rem solid #ff725c; padding-left: .6rem; }
"""


def html_page(report: BenchReport, light: bytes | None, dark: bytes | None = None) -> str:
    """One self-contained page: style and pictures are embedded; the dark picture is shown in dark mode."""

    def table(rows: Rows, kind: str = "") -> str:
        cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
        return f"<table{kind}>{cells}</table>"

    parts = [f"<h1>{escape(report.name)}</h1>", table(headline(report), ' class="headline"')]
    parts.append(f"<p>{escape(report.made_at)}</p>")
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings]
    if light is not None:
        day, night = (base64.b64encode(one or light).decode() for one in (light, dark))
        source = f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{night}">'
        image = f'<img alt="step times and parts of a step" src="data:image/png;base64,{day}">'
        parts.append(f"<picture>{source}{image}</picture>")
    parts += [f"<h2>{escape(title)}</h2>{table(rows)}" for title, rows in tables(report)]
    return document(report.name, _STYLE, "".join(parts))


def mllog_lines(report: BenchReport, started_ms: int, ended_ms: int) -> Iterator[str]:
    """MLPerf's log format (`:::MLLOG {json}`), with the result keys that apply to a throughput run."""

    def line(kind: str, time_ms: int, key: str, value: Any, **metadata: Any) -> str:
        entry = {"namespace": "", "time_ms": time_ms, "event_type": kind, "key": key}
        return ":::MLLOG " + json.dumps(entry | {"value": value, "metadata": metadata})

    shape = report.shape
    for key, value in (
        ("submission_benchmark", report.name),
        ("submission_platform", f"{shape['devices']}x{report.environment['device']}"),
        ("global_batch_size", shape["global_batch_size"]),
        ("gradient_accumulation_steps", shape["accumulation_steps"]),
        ("max_sequence_length", shape["sequence_length"]),
        ("seed", report.identity["seed"]),
    ):
        yield line("POINT_IN_TIME", started_ms, key, value)
    yield line("INTERVAL_START", started_ms, "run_start", None)
    samples_per_s = report.speed.tokens_per_second / shape["sequence_length"]
    tracked = {"throughput": samples_per_s, "step_ms": report.speed.step_ms_p50}
    yield line("POINT_IN_TIME", ended_ms, "tracked_stats", tracked, unit="samples/s")
    status = {True: "success", False: "aborted", None: "unchecked"}[report.correctness.passed]
    yield line("INTERVAL_END", ended_ms, "run_stop", None, status=status)


def write_report(report: BenchReport, folder: Path) -> list[Path]:
    """Write report.json, .md, .csv, .html and, with matplotlib, .png into a folder; their paths. Raises OSError."""
    light: bytes | None = None
    dark: bytes | None = None
    with contextlib.suppress(NoMatplotlibError):  # what was measured is kept
        light, dark = plots(report), plots(report, dark=True)
    files = {
        "report.json": report.model_dump_json(indent=1).encode() + b"\n",
        "report.md": markdown(report).encode(),
        "report.csv": csv_text([flat(report)]).encode(),
        "report.html": html_page(report, light, dark).encode(),
    } | ({} if light is None else {"report.png": light})
    fsops.make_dirs(folder)
    for name, data in files.items():
        fsops.write_bytes(folder / name, data)
    return [folder / name for name in files]
