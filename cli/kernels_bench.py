"""`weftrain kernels bench`: how fast the implementations of each op are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from weftrain.cli.display import Bar, Console, drawing
from weftrain.cli.kernel_parts import (
    DEVICE,
    DTYPES,
    JSON,
    OPS,
    interpreted,
    mend_the_interpreter,
    print_table,
    progress,
    repeated,
)
from weftrain.core.formats.units import gib

if TYPE_CHECKING:
    from weftrain.kernels.bench.report import KernelBenchReport, Measurement


@click.command("bench")
@OPS
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="SOURCE",
    help="Only this source (repeatable); 'reference' is torch eager.",
)
@click.option(
    "--suite",
    default="small",
    show_default=True,
    metavar="SUITE",
    help="Shapes to measure: small, 70m, 7b, 7b_16k, or a FILE of `bench train --record-shapes`.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="bfloat16",
    show_default=True,
    help="Dtype of the activations; recorded shapes have their own.",
)
@DEVICE
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's]")
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Samples for each source.")
@click.option(
    "--interpret",
    is_flag=True,
    help="Run Triton kernels under its interpreter, in a separate process: times mean nothing.",
)
@JSON
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw the roofline shares.",
)
def bench(
    ops: tuple[str, ...],
    sources: tuple[str, ...],
    suite: str,
    dtype: str,
    device: str,
    threads: int | None,
    repeats: int,
    interpret: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Time the sources of each op, interleaved: median, interval, GB/s, FLOP/s, share of this machine's roofline.

    Every sample has new inputs, and what it returned is compared with the reference. Exit code 1 if a source did not do
    its work, or is faster than this machine can be.
    """
    if interpret:
        if device != "cpu":
            raise click.BadParameter("the interpreter runs on the CPU", param_hint="--interpret")
        rest = [*repeated(ops=ops, sources=sources), "--suite", suite, "--dtype", dtype, "--repeats", str(repeats)]
        rest += ["--threads", str(threads)] if threads else []
        rest += ["--plot", str(plot_path)] if plot_path else []
        sys.exit(interpreted("bench", rest, json_path))
    import torch

    from weftrain.kernels.bench import measure
    from weftrain.kernels.bench.suites import SUITES, recorded_cases

    mend_the_interpreter()
    if threads is not None:
        torch.set_num_threads(threads)
    console, recorded = Console(), None
    if suite not in SUITES:
        recorded = recorded_cases(_suite_file(suite, list(SUITES)), suite)
    with Bar(console, "benchmarks", 1) as bar:
        report = measure.bench(
            ops or None,
            sources or None,
            suite,
            getattr(torch, dtype),
            device,
            repeats,
            progress=progress(bar),
            recorded=recorded,
        )
    if json_path is not None:
        json_path.write_text(report.to_json())
    _print_report(report, console)
    if plot_path is not None:
        from weftrain.analysis.figure import new_figure, picture
        from weftrain.core.formats import fsops
        from weftrain.kernels.bench.plot import draw_shares

        with drawing():
            figure = new_figure(6, 4.5)
            draw_shares(report, figure)
            fsops.write_bytes(plot_path, picture(figure, plot_path.suffix))
    sys.exit(0 if report.honest else 1)


def _print_report(report: KernelBenchReport, console: Console) -> None:
    for line in machine_lines(report):
        console.print(line)
    print_table(bench_table(report))
    for reason in dict.fromkeys(
        _why_skipped(item.op, item.example, item.source, item.reason) for item in report.skipped
    ):
        console.print(reason)
    for one in report.refused:
        where = f"{one.op} {one.example} {one.source} {one.direction}"
        console.print(f"REFUSED {where}: {one.trick}: {one.detail}")


def _suite_file(suite: str, known: Sequence[str]) -> str:
    from weftrain.core.formats.plain_file import read_plain

    path = Path(suite)
    if not path.exists():
        told = f"'{suite}' is neither a suite ({', '.join(known)}) nor a file"
        raise click.BadParameter(told, param_hint="--suite")
    return read_plain(path, "record").decode(errors="replace")


def machine_lines(report: KernelBenchReport) -> list[str]:
    """The machine, and the peaks that the table is measured against."""
    env = report.environment

    def figure(name: str, unit: str) -> str:
        value = env[f"{name}_{unit}_per_second"]
        return "unknown" if value is None else f"{value:,.1f} {'GFLOP' if unit == 'gflop' else 'GB'}/s"

    lines = [
        f"{env['device']}, {env['threads']} threads, {env['cpu_capability']}, torch {env['torch']}, {env['dtype']}, "
        f"suite {env['suite']}",
        f"peak       {figure('measured_peak', 'gflop')} ({env['measured_peak_origin']}); "
        f"data sheet: {figure('sourced_peak', 'gflop')} ({env['sourced_peak_origin']})",
        f"bandwidth  {figure('measured_bandwidth', 'gb')} ({env['measured_bandwidth_origin']}); "
        f"data sheet: {figure('sourced_bandwidth', 'gb')} ({env['sourced_bandwidth_origin']})",
    ]
    if env["device_type"] == "cuda":
        return [
            *lines,
            f"cache      {gib(env['cache_bytes'])} ({env['cache_origin']}), overwritten before each sample",
        ]
    copies = sorted({one.copies for one in report.measurements})
    spread = (
        f"{copies[0]:,} to {copies[-1]:,}" if len(copies) > 1 else ", ".join(f"{count:,}" for count in copies) or "no"
    )
    within = sorted({f"{one.op} {one.example}" for one in report.measurements if not one.beyond_cache})
    fits = f"; still within the cache: {', '.join(within)}" if within else ""
    return [
        *lines,
        f"cache      {gib(env['cache_bytes'])} ({env['cache_origin']}); inputs in {spread} copies, used in turn{fits}",
    ]


def bench_table(report: KernelBenchReport) -> Table:
    """One line for each measurement; 'x eager' is the reference's median over this one."""
    eager = {
        (one.op, one.example, one.direction): one.median_ms for one in report.measurements if one.source == "reference"
    }
    headings = (
        "op,example,direction,source,ms (median),interval,x eager,launch ms,peak MiB,GB/s,GFLOP/s,roofline,bound,"
    )
    shown = Table(*headings.split(","), box=None, pad_edge=False)
    for one in report.measurements:
        shown.add_row(*_cells(one, eager.get((one.op, one.example, one.direction))))
    return shown


def _cells(one: Measurement, eager_ms: float | None) -> list[str]:
    interval = f"{one.low_ms:.4g} - {one.high_ms:.4g}" + ("" if one.confidence >= 0.95 else f" ({one.confidence:.0%})")
    names = {"reference": "reference (torch eager)", "torch.compile": "torch.compile (reference)"}
    times = "-" if eager_ms is None else f"{eager_ms / one.median_ms:.2f}"
    share = "unknown" if one.roofline_share is None else f"{one.roofline_share:.1%}"
    rates = [f"{one.gb_per_second:.3g}", f"{one.gflop_per_second:.4g}"]
    source = names.get(one.source, one.source)
    median = f"{one.median_ms:.4g}"
    where = [one.op, one.example, one.direction, source]
    beside = [
        "-" if one.launch_ms is None else f"{one.launch_ms:.3g}",
        "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.4g}",
    ]
    told = "; ".join(text for text in (f"ERROR: {one.error}" if one.error else "", one.note) if text)
    return [*where, median, interval, times, *beside, *rates, share, one.bound or "-", told]


def _why_skipped(op: str, example: str, source: str, reason: str) -> str:
    return f"not measured: {' '.join(part for part in (op, example, source) if part)}: {reason}"
