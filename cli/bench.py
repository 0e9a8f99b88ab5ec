"""`weftrain bench`: throughput of training, streaming, the data path, kernels and the machine."""

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
from weftrain.cli.display import Bar, Console, this_program
from weftrain.cli.kernels import bench as kernels_bench
from weftrain.cli.resolve import Resolved, resolve, resolve_recipe

if TYPE_CHECKING:
    from weftrain.analysis.bench.run import BenchRequest


@click.group()
def bench() -> None:
    """Measure speed."""


bench.add_command(kernels_bench, "kernels")


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
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
                "--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs, each prepared anew."
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


@bench.command("train")
@arguments.recipe
@arguments.overrides
@click.option("--backend", help="Backend instead of the recipe's.")
@_run_options
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path),
    help="Folder for report.json, .md, .csv, .png and .html.",
)
@click.option(
    "--profile",
    "profile_folder",
    type=click.Path(path_type=Path),
    help="Folder for trace.json (Perfetto) and operators.md.",
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
    rounds: int,
    threads: int | None,
    ranks: int,
    check_steps: int,
    report_folder: Path | None,
    profile_folder: Path | None,
    mllog: Path | None,
    against: str | None,
    timeout_s: float,
) -> None:
    """Training throughput of RECIPE on fixed random rows, as a line `RESULT {json}` and, with --report, as pages.

    Exit code 4 if the first losses leave the reference's tolerance. With --against, the two programs alternate, each
    round in a process of its own; it prints the ratio of tokens/s with its 95 % interval, a verdict, and the losses
    after the last step that both made.
    """
    numbers = ["--steps", str(steps), "--ranks", str(ranks)]
    numbers += [] if threads is None else ["--threads", str(threads)]
    numbers += [] if backend is None else ["--backend", backend]
    if against is not None:
        ours = this_program("bench", "train", recipe, *overrides, *numbers, "--check-steps", "0")
        _alternate(ours, against, rounds, timeout_s)
        return
    if ranks > 1 and "RANK" not in os.environ:
        _launch(ranks, threads or 1)
    from weftrain.analysis.bench.run import BenchRequest

    wishes = BenchRequest(steps, rounds, check_steps, profile_folder, threads=threads)
    _bench(resolve(recipe, overrides, backend), wishes, report_folder, mllog, default_threads=2 if ranks == 1 else 1)


def _launch(ranks: int, threads: int) -> None:
    """Run this same command in every rank by torchrun, and exit with its exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", "weftrain.cli", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False).returncode)


def _bench(
    resolved: Resolved, wishes: BenchRequest, report_folder: Path | None, mllog: Path | None, default_threads: int = 2
) -> None:
    """Measure, and print the RESULT line. default_threads: CPU threads of a process if neither --threads nor the
    backend's options set them.
    """
    import torch

    from weftrain.analysis.bench.pages import mllog_lines, write_report
    from weftrain.analysis.bench.run import bench, milliseconds
    from weftrain.analysis.bench.train import RESULT_PREFIX, bench_source, result_line
    from weftrain.backends.common.registry import get_backend
    from weftrain.core.backend import Follower, Job, Plan
    from weftrain.core.formats import fsops

    recipe, backend, options = resolved
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
        for path in write_report(report, report_folder):
            click.echo(f"wrote {path}", err=True)
    if mllog is not None:
        fsops.write_bytes(mllog, "".join(f"{line}\n" for line in mllog_lines(report, started, milliseconds())).encode())
    if wishes.profile is not None:
        click.echo(f"profile in {wishes.profile}: trace.json opens in ui.perfetto.dev", err=True)
    if report.correctness.passed is False:
        click.echo(
            f"weftrain: the benchmark failed: {report.correctness.words}, tolerance {report.correctness.tolerance:.2g}",
            err=True,
        )
        sys.exit(4)


def _alternate(ours_command: list[str], program: str, rounds: int, timeout_s: float) -> None:
    from weftrain.analysis.bench.against import against
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


@bench.command("stream")
@arguments.recipe
@arguments.overrides
@_run_options
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path),
    help="Folder for report.json, .md, .csv, .png and .html.",
)
def bench_stream(
    recipe: str,
    overrides: tuple[str, ...],
    steps: int,
    rounds: int,
    threads: int | None,
    ranks: int,
    check_steps: int,
    report_folder: Path | None,
) -> None:
    """The same by weight streaming, with the bytes that the store moved and the time spent waiting for it.

    Its replicas join by `weftrain replica`, so --ranks other than 1 is refused.
    """
    from weftrain.analysis.bench.run import BenchRequest

    if ranks != 1:
        raise click.BadParameter(
            "replicas of weight streaming join a training run: `weftrain replica`", param_hint="--ranks"
        )
    _bench(
        resolve(recipe, overrides, "streaming"),
        BenchRequest(steps, rounds, check_steps, threads=threads),
        report_folder,
        None,
    )


@bench.command("data")
@arguments.recipe
@arguments.overrides
@click.option("--steps", type=click.IntRange(min=2), default=50, show_default=True, help="Batches that are read.")
@click.option(
    "--h5py", "beside_h5py", is_flag=True, help="Read as many rows through h5py, interleaved, and print the ratio."
)
def bench_data(recipe: str, overrides: tuple[str, ...], steps: int, beside_h5py: bool) -> None:
    """Measure the data path of RECIPE without a model: from the shard files to batches of int64 ids."""
    from weftrain.analysis.bench.data import batch_times_ms, beside_h5py_ms
    from weftrain.analysis.bench.timings import median_interval, percentile, warm_up_steps
    from weftrain.cli.assembly import open_data
    from weftrain.core.data import TokenSource

    file = resolve_recipe(recipe, overrides)
    source, _ = open_data(file.recipe)
    if beside_h5py and not isinstance(source, TokenSource):
        raise click.BadParameter("synthetic rows lie in no file; name a recipe with data.sources", param_hint="--h5py")
    rows = file.recipe.batch.global_batch_size
    theirs_ms: list[float] = []
    if beside_h5py and isinstance(source, TokenSource):
        step_ms, theirs_ms = beside_h5py_ms(source, steps)
    else:
        step_ms = batch_times_ms(source, steps)
    warm = warm_up_steps(step_ms)
    counted = step_ms[warm:]
    middle, interval = statistics.median(counted), median_interval([counted])
    per_second = file.recipe.tokens_per_step / middle * 1e3
    spread = f"95 %: {interval.low:,.3f} to {interval.high:,.3f}; p99 {percentile(counted, 0.99):,.3f}"
    click.echo(f"{per_second / 1e6:,.2f} M tokens/s: {middle:,.3f} ms a batch of {rows} rows ({spread})")
    click.echo(
        f"first batch {step_ms[0]:,.2f} ms; {warm} of {steps} batches were warm-up; dataset {source.dataset_id[:12]}"
    )
    if theirs_ms:
        ratio = statistics.median(theirs / ours for ours, theirs in zip(counted, theirs_ms[warm:], strict=True))
        by_h5py = file.recipe.tokens_per_step / statistics.median(theirs_ms[warm:]) * 1e3
        click.echo(
            f"h5py, row by row: {by_h5py / 1e6:,.2f} M tokens/s; the median ratio of a pair of batches is {ratio:.1f}"
        )


@bench.command("compare")
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--fail-above", type=float, metavar="PERCENT", help="Exit code 5 where B is slower by more than this, at 95 %."
)
def bench_compare(reports: tuple[Path, ...], fail_above: float | None) -> None:
    """Compare reports A B: ratio of step times, its interval, a verdict at 95 %, and every difference of configuration.

    Several interleaved reports are compared round by round: A1 B1 A2 B2 ...
    """
    from weftrain.analysis.bench.report import configuration_differences, read_report
    from weftrain.analysis.bench.timings import difference

    if len(reports) % 2:
        raise click.BadParameter("give reports in pairs: A B, or A1 B1 A2 B2 ...")
    found = [read_report(path) for path in reports]
    a, b = found[0::2], found[1::2]
    for line in configuration_differences(a[0], b[0]):
        click.echo(f"differs: {line}")
    for title, ones in (("A", a), ("B", b)):
        speeds = statistics.median(one.speed.tokens_per_second for one in ones)
        click.echo(f"{title}: {ones[0].name}: {speeds:,.1f} tokens/s")
    raw = difference([values for one in a for values in one.counted], [values for one in b for values in one.counted])
    click.echo(f"step time B / A = {raw.ratio:.4f} (95 %: {raw.low:.4f} to {raw.high:.4f}), in wall-clock time")
    result = raw
    in_probes = [[one.in_probes for one in ones] for ones in (a, b)]
    if all(values is not None for ones in in_probes for values in ones):
        x, y = ([values for rounds in ones if rounds is not None for values in rounds] for ones in in_probes)
        result = difference(x, y)
        words = "in units of a fixed matrix product timed beside each step"
        click.echo(f"step time B / A = {result.ratio:.4f} (95 %: {result.low:.4f} to {result.high:.4f}), {words}")
    click.echo(result.verdict)
    if fail_above is not None and result.low - 1 > fail_above / 100:
        sys.exit(5)


@bench.command("sweep")
@arguments.recipe
@arguments.overrides
@click.option(
    "--vary",
    multiple=True,
    required=True,
    metavar="KEY=A,B,...",
    help="A key and its values (repeatable): all combinations run.",
)
@click.option(
    "--to", "folder", type=click.Path(path_type=Path), required=True, help="Folder for sweep.csv and a report of each."
)
@click.option("--steps", type=click.IntRange(min=4), default=12, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option(
    "--timeout", "timeout_s", type=float, default=900.0, show_default=True, help="Seconds for one combination."
)
def bench_sweep(
    recipe: str,
    overrides: tuple[str, ...],
    vary: tuple[str, ...],
    folder: Path,
    steps: int,
    ranks: int,
    threads: int | None,
    timeout_s: float,
) -> None:
    """Measure RECIPE under every combination of --vary values, each in a process of its own; a second run resumes.

    Example: --vary batch.micro_batch_size=1,2,4 --vary backend.options.compile=true,false --vary
    kernels.preferences=[torch],[cpp,torch]
    """
    from weftrain.analysis.bench.sweep import combinations, run_sweep

    command = this_program("bench", "train", recipe, *overrides, "--steps", str(steps), "--ranks", str(ranks))
    command += [] if threads is None else ["--threads", str(threads)]
    console = Console()
    chosen = combinations(vary)
    with Bar(console, "sweep", len(chosen)) as bar:
        rows = run_sweep(command, chosen, folder, timeout_s, lambda done, words: bar.update(done, words))
    best = max(
        (row for row in rows if row["tokens_per_second"]), key=lambda row: float(row["tokens_per_second"]), default=None
    )
    keys = [key for key, _ in chosen[0]]
    table = Table(*keys, "tokens/s", "step ms", "MFU", "memory MiB", "", box=None)
    for row in rows:
        if row["tokens_per_second"]:
            share = row["mfu_measured"]
            figures = [f"{float(row['tokens_per_second']):,.1f}", f"{float(row['step_ms_p50']):,.1f}"]
            figures += [
                share if share == "unknown" else f"{float(share):.1%}",
                f"{float(row['peak_memory_bytes']) / 2**20:,.0f}",
            ]
            words = "best" if row is best else ""
        else:
            figures, words = ["-"] * 4, row["error"]
        table.add_row(*(row[key] for key in keys), *figures, words, style="bold" if row is best else None)
    console.print(table)
    console.print(f"all figures: {folder / 'sweep.csv'}")


@bench.command("machine")
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes, started by torchrun; with collectives from 2.",
)
@click.option("--disk", type=click.Path(path_type=Path), help="Folder whose disk is measured too.")
@click.option(
    "--largest-mib",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Largest collective message.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for all figures.")
def bench_machine(ranks: int, disk: Path | None, largest_mib: int, json_file: Path | None) -> None:
    """Measure this machine: matrix products by dtype, memory, disk, collectives by size on every rank; outliers."""
    from weftrain.analysis.machine.survey import machine_lines, measure_ranks
    from weftrain.core.formats import fsops

    if ranks > 1 and "RANK" not in os.environ:
        _launch(ranks, 1)
    found = measure_ranks(ranks, largest_mib, disk)
    if found is None:
        return  # rank 0 prints
    for line in machine_lines(found):
        click.echo(line)
    if json_file is not None:
        fsops.write_bytes(json_file, json.dumps(found, indent=1).encode() + b"\n")
