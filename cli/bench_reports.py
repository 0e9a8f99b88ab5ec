"""`weftrain bench compare`, `submission` and `verify`: reports that were made earlier, here or on other machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Column, Table

from weftrain.cli.arguments import NamedPath
from weftrain.cli.display import Console, drawing

if TYPE_CHECKING:
    from weftrain.analysis.bench.compare import Side

_TABLE_COLUMNS = 72  # a narrower terminal gets a block a report instead of a table


@click.command("compare")
@click.argument("reports", nargs=-1, required=True, type=NamedPath(path_type=Path))
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Interleaved rounds that the reports are of: with 2, A1 B1 A2 B2.",
)
@click.option(
    "--fail-above",
    type=float,
    metavar="PERCENT",
    help="Exit code 5 where one is slower than the first by more than this, at 95 %.",
)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="File for a picture: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/json-output.md) instead of the table.")
def bench_compare(
    reports: tuple[Path, ...], rounds: int, fail_above: float | None, plot_file: Path | None, as_json: bool
) -> None:
    """Compare reports A B ..., of one machine or several: one table, and for each after the first every difference of
    configuration, the ratio of step times with its interval, and a verdict at 95 %.

    Reports of interleaved runs are compared round by round with --rounds: A1 B1 A2 B2 ...
    """
    from weftrain.analysis.bench import compare
    from weftrain.analysis.bench.report import read_report
    from weftrain.core.formats import fsops

    if len(reports) % rounds or len(reports) < 2 * rounds:
        many = "two reports or more" if rounds == 1 else f"{rounds} rounds of two sides or more: A1 B1 ... A2 B2 ..."
        raise click.BadParameter(f"{len(reports)} given: give {many}")
    sides = compare.sides_of([read_report(path) for path in reports], rounds)
    if as_json:
        click.echo(json.dumps(compare.as_json(sides), indent=1))
    else:
        _print_sides(sides)
    if plot_file is not None:
        with drawing():
            fsops.write_bytes(plot_file, compare.plot(sides, plot_file.suffix or ".png"))
            click.echo(f"wrote {plot_file}", err=True)
    if fail_above is not None and any(one.judged and one.judged.low - 1 > fail_above / 100 for one in sides):
        sys.exit(5)


def _print_sides(sides: list[Side]) -> None:
    for side in sides:
        for line in side.differences:
            click.echo(f"{side.label} differs: {line}")
    console = Console()
    rows = [_row(side) for side in sides]
    if console.width < _TABLE_COLUMNS:
        for row in rows:
            for name, value in row.items():
                console.print(f"{name}: {value}" if name else f"{value}", style=None if name else "bold")
    else:
        table = Table(*(Column(name, overflow="fold") for name in rows[0]), box=None)
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
    for side in sides:
        _print_verdict(side, sides[0])


def _print_verdict(side: Side, first: Side) -> None:
    tokens = {one.reports[0].shape["tokens_per_step"] for one in (side, first)}
    what = "step time" if len(tokens) == 1 else "time a token"
    if side.reports[0].correctness.passed is False:
        click.echo(f"{side.label} FAILED its check of the losses: {side.reports[0].correctness.words}")
    for found, words in (
        (side.to_first, "in wall-clock time"),
        (side.in_probes, "in units of a fixed matrix product timed beside each step"),
    ):
        if found is not None:
            interval = f"(95 %: {found.low:.4f} to {found.high:.4f})"
            click.echo(f"{what} {side.label} / {first.label} = {found.ratio:.4f} {interval}, {words}")
    if side.judged is not None:
        click.echo(side.judged.verdict)


def _row(side: Side) -> dict[str, str]:
    from weftrain.analysis.bench.compare import device_of, machine_of

    report, ratio = side.reports[0], side.speed_ratio
    return {
        "": side.label,
        "machine": machine_of(report),
        "device": device_of(report),
        "recipe": report.name,
        "tokens/s (95 %)": f"{side.tokens_per_second:,.1f} ({side.low:,.1f} to {side.high:,.1f})",
        "MFU": side.mfu if isinstance(side.mfu, str) else f"{side.mfu:.1%}",
        "to the first (95 %)": "1" if ratio is None else "{:.3f} ({:.3f} to {:.3f})".format(*ratio),
    }


@click.command("submission")
@click.argument("report", type=NamedPath(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def bench_submission(report: Path, folder: Path) -> None:
    """Make FOLDER to publish from an earlier REPORT, as `bench train --submission FOLDER` does."""
    from weftrain.analysis.bench.report import read_report
    from weftrain.analysis.bench.submission import write_submission

    root = write_submission(read_report(report), folder)
    click.echo(f"wrote {folder}, root {root}")


@click.command("mlperf")
@click.argument("run", type=NamedPath(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--org", required=True, help="Who submits the result.")
@click.option("--platform", required=True, help="Name of the system, as the submission's folder calls it.")
@click.option("--division", type=click.Choice(["closed", "open"]), default="closed", show_default=True)
@click.option("--caches-cleared", is_flag=True, help="Say that the system's caches were cleared before the run.")
def bench_mlperf(run: Path, file: Path, org: str, platform: str, division: str, caches_cleared: bool) -> None:
    """Write MLPerf Training's result log of RUN, a finished run of llama31_8b, into FILE.

    It has every key that the benchmark's compliance checker asks for, with the times that the run recorded.
    """
    from weftrain.analysis.bench.mlperf import Submission, result_lines
    from weftrain.core.formats import fsops

    lines = result_lines(run, Submission(org, platform, division, caches_cleared))
    fsops.write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
    click.echo(f"wrote {len(lines)} lines to {file}")


@click.command("verify")
@click.argument("folder", type=NamedPath(path_type=Path))
def bench_verify(folder: Path) -> None:
    """Check the submission in FOLDER: every byte, and that its figures follow from its raw steps and its recipe.

    Exit code 1 if something is wrong. What no check of files can show is printed too.
    """
    from weftrain.analysis.bench.compare import device_of, machine_of
    from weftrain.analysis.bench.submission import UNPROVEN, SubmissionError, check_submission

    try:
        report, root = check_submission(folder)
    except SubmissionError as error:
        for problem in error.problems:
            click.echo(f"WRONG: {problem}")
        sys.exit(1)
    speed, mfu = report.speed, report.efficiency.mfu_measured
    interval = f"95 %: step of {speed.step_ms_p50_low:,.2f} to {speed.step_ms_p50_high:,.2f} ms"
    share = mfu if isinstance(mfu, str) else f"{mfu:.1%}"
    click.echo(f"{report.name}: {speed.tokens_per_second:,.1f} tokens/s ({interval}), MFU {share}")
    click.echo(f"on {device_of(report)} ({machine_of(report)})")
    click.echo(f"every byte is as it was sealed, root {root}")
    click.echo("speed, intervals, MFU, shape and the recipe's hash follow from the raw steps and the recipe")
    for words in UNPROVEN:
        click.echo(f"not proven: {words}")
