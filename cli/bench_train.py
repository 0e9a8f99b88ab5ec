"""`weftrain bench train`: a recipe's throughput, alone or interleaved with another program."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Column, Table

from weftrain.cli import arguments
from weftrain.cli.display import Bar, Console, program, this_program
from weftrain.cli.resolve import Resolved, resolve

if TYPE_CHECKING:
    from weftrain.analysis.bench.report import BenchReport
    from weftrain.analysis.bench.run import BenchRequest


# Three processes a side are the fewest whose spread gives Student's interval a useful width: 4.3 standard errors, where
# two give 12.7.
ROUNDS_AGAINST = 3


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that define one measurement."""
    for option in reversed(
        (
            click.option(
                "--steps",
                type=click.IntRange(min=4),
                default=20,
                show_default=True,
                help="Steps of each round, warm-up included.",
            ),
            click.option(
                "--threads",
                type=click.IntRange(min=1),
                help="CPU threads of a process.  [default: 2, and 1 with --ranks]",
            ),
            click.option(
                "--ranks",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                help="Processes, started by torchrun.",
            ),
            click.option(
                "--check-steps",
                type=click.IntRange(min=0),
                default=2,
                show_default=True,
                help="First losses that are compared with the reference.",
            ),
        )
    ):
        command = option(command)
    return command


@click.command("train")
@arguments.recipe
@arguments.overrides
@click.option("--backend", help="Backend instead of the recipe's.")
@run_options
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Runs, each prepared anew; with --against each in a new process.  "
    f"[default: 1, and {ROUNDS_AGAINST} with --against]",
)
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path),
    help="Folder for report.json, .md, .csv, .png and .html.",
)
@click.option(
    "--submission",
    type=click.Path(path_type=Path),
    help="New folder to publish: report, environment, raw steps, recipe, hashes (`bench verify` checks it).",
)
@click.option(
    "--profile",
    "profile_folder",
    type=click.Path(path_type=Path),
    help="Folder for trace.json (Perfetto) and operators.md.",
)
@click.option(
    "--record-shapes",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File for the shapes of one step's kernels: a suite for `kernels bench`.",
)
@click.option("--mllog", type=click.Path(path_type=Path), help="File for MLPerf result lines.")
@click.option(
    "--against", metavar="COMMAND", help="Run this program interleaved with ours; a .py file is run with this Python."
)
@click.option(
    "--timeout", "timeout_s", type=float, default=900.0, show_default=True, help="Seconds for one round of one program."
)
def bench_train(
    recipe: str,
    overrides: tuple[str, ...],
    backend: str | None,
    steps: int,
    threads: int | None,
    ranks: int,
    check_steps: int,
    rounds: int | None,
    report_folder: Path | None,
    submission: Path | None,
    profile_folder: Path | None,
    record_shapes: Path | None,
    mllog: Path | None,
    against: str | None,
    timeout_s: float,
) -> None:
    """Training throughput of RECIPE on fixed random rows, as a line `RESULT {json}` and, with --report, as pages.

    Exit code 4 if the first losses leave the reference's tolerance. With --against, the two programs alternate, each
    round in a process of its own; it prints the ratio of tokens/s with its 95 % interval, a verdict, and the losses
    after the last step that both report. Both have to make --steps steps: another number is refused after one round.
    """
    numbers = ["--steps", str(steps), "--ranks", str(ranks)]
    numbers += [] if threads is None else ["--threads", str(threads)]
    numbers += [] if backend is None else ["--backend", backend]
    if against is not None:
        ours = this_program("bench", "train", recipe, *overrides, *numbers, "--check-steps", "0")
        _alternate(ours, against, rounds or ROUNDS_AGAINST, timeout_s)
        return
    if ranks > 1 and "RANK" not in os.environ:
        launch(ranks, threads or 1)
    from weftrain.analysis.bench.run import BenchRequest

    wishes = BenchRequest(steps, rounds or 1, check_steps, profile_folder, record_shapes, threads=threads)
    resolved = resolve(recipe, overrides, backend)
    default_threads = 2 if ranks == 1 else 1
    measure(resolved, wishes, report_folder, mllog, submission, default_threads=default_threads)


def launch(ranks: int, threads: int) -> None:
    """Run this same command in every rank by torchrun, and exit with its exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", "weftrain.cli", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False).returncode)


def measure(
    resolved: Resolved,
    wishes: BenchRequest,
    report_folder: Path | None,
    mllog: Path | None = None,
    submission: Path | None = None,
    default_threads: int = 2,
) -> None:
    """Measure, and print the RESULT line. default_threads: CPU threads of a process if neither --threads nor the
    backend's options set them.
    """
    import torch

    from weftrain.analysis.bench.pages import mllog_lines
    from weftrain.analysis.bench.run import bench, milliseconds
    from weftrain.analysis.bench.train import RESULT_PREFIX, bench_source, result_line
    from weftrain.backends.common.registry import get_backend
    from weftrain.core.backend import Follower, Job, Plan
    from weftrain.core.formats import fsops

    recipe, backend, options = resolved
    if submission is not None and submission.exists():  # before anything is measured
        raise click.BadParameter(f"{submission} is there already: name a new folder", param_hint="--submission")
    torch.set_num_threads(wishes.threads or default_threads)
    if isinstance(backend, Follower) and backend.follows():
        job = Job(recipe, Plan(0, wishes.steps), options, threads=wishes.threads)
        backend.run_worker(lambda: job, lambda job: bench_source(job.recipe), 0)
        return
    console = Console(stderr=True)
    started = milliseconds()
    with Bar(console, "measuring", wishes.steps * wishes.rounds) as bar:
        report = bench(
            recipe,
            backend,
            options,
            get_backend("local"),
            wishes,
            lambda number, step, ms: bar.update((number - 1) * wishes.steps + step, f"round {number}: {ms:,.1f} ms"),
        )
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(RESULT_PREFIX + json.dumps(result_line(report)))
    if report_folder is not None:
        _write_report(report, report_folder)
    if mllog is not None:
        fsops.write_bytes(mllog, "".join(f"{line}\n" for line in mllog_lines(report, started, milliseconds())).encode())
    if wishes.profile is not None:
        click.echo(f"profile in {wishes.profile}: trace.json opens in ui.perfetto.dev", err=True)
    if wishes.record_shapes is not None:
        again = f"{program()} kernels bench --suite {shlex.quote(str(wishes.record_shapes))}"
        click.echo(f"shapes in {wishes.record_shapes}: `{again}` measures them", err=True)
    if report.correctness.passed is False:
        click.echo(
            f"weftrain: the benchmark failed: {report.correctness.words}, tolerance {report.correctness.tolerance:.2g}",
            err=True,
        )
        sys.exit(4)
    if submission is not None:
        from weftrain.analysis.bench.submission import write_submission

        root = write_submission(report, submission)
        check = f"{program()} bench verify {shlex.quote(str(submission))}"
        click.echo(f"wrote {submission}, root {root}: `{check}` checks it", err=True)


def _write_report(report: BenchReport, folder: Path) -> None:
    from weftrain.analysis.bench.pages import write_report

    for path in write_report(report, folder):
        click.echo(f"wrote {path}", err=True)
    if not (folder / "report.png").exists():
        click.echo("warning: no picture: matplotlib is missing: pip install 'weftrain[plot]'", err=True)


def _alternate(ours_command: list[str], program: str, rounds: int, timeout_s: float) -> None:
    from weftrain.analysis.bench.against import against, check_steps
    from weftrain.analysis.bench.train import run_program

    theirs_command = shlex.split(program)
    if theirs_command and theirs_command[0].endswith(".py"):
        theirs_command = [sys.executable, *theirs_command]
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        for command, results in ((ours_command, ours), (theirs_command, theirs)):
            result = run_program(command, timeout_s)
            results.append(result)
            click.echo(
                f"round {number}: {result['name']:<28} {result['tokens_per_second']:>8} tokens/s  "
                f"{result['step_ms']:>8} ms a step"
            )
        if silent := check_steps(ours[-1], theirs[-1]):
            click.echo(f"warning: {silent}", err=True)
    found = against(ours, theirs)
    losses = found.losses
    table = Table(
        Column("", overflow="fold"), "tokens/s", "step ms", "loss, step 1", f"loss, step {losses.step}", box=None
    )
    for results, loss in ((ours, losses.ours), (theirs, losses.theirs)):
        middle = [
            f"{statistics.median(result[key] for result in results):,.1f}" for key in ("tokens_per_second", "step_ms")
        ]
        table.add_row(results[0]["name"], *middle, f"{results[0]['loss_first']:.4f}", f"{loss:.4f}")
    Console().print(table)
    ratios = ", ".join(f"{ratio:.3f}" for ratio in found.ratios)
    interval = "" if found.speed is None else f" (95 %: {found.speed.low:.3f} to {found.speed.high:.3f})"
    click.echo(f"ratio of tokens/s: {found.ratio:.3f}{interval}, median of {ratios}")
    click.echo(found.verdict)
    click.echo(losses.verdict)
