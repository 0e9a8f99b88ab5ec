"""`weftrain bench`: throughput of training, streaming, the data path, kernels and the machine."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from weftrain.cli import arguments
from weftrain.cli.bench_reports import bench_compare, bench_mlperf, bench_submission, bench_verify
from weftrain.cli.bench_train import bench_train, launch, measure, run_options
from weftrain.cli.display import Bar, Console, this_program
from weftrain.cli.kernels_bench import bench as kernels_bench
from weftrain.cli.resolve import resolve, resolve_recipe
from weftrain.core.errors import BackendError, RecipeError
from weftrain.core.formats.units import gb

if TYPE_CHECKING:
    from weftrain.analysis.bench.sweep import Combination


@click.group(cls=arguments.Group)
def bench() -> None:
    """Measure speed."""


bench.add_command(kernels_bench, "kernels")
bench.add_command(bench_train)


@bench.command("stream")
@arguments.recipe
@arguments.overrides
@run_options
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs, each prepared anew.")
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
    threads: int | None,
    ranks: int,
    check_steps: int,
    rounds: int,
    report_folder: Path | None,
) -> None:
    """Measure training of RECIPE by weight streaming, with the bytes that the store moved and the time spent waiting.

    Its replicas join by `weftrain replica`, so --ranks other than 1 is refused.
    """
    from weftrain.analysis.bench.run import BenchRequest

    if ranks != 1:
        raise click.BadParameter(
            "replicas of weight streaming join a training run: `weftrain replica`", param_hint="--ranks"
        )
    measure(
        resolve(recipe, overrides, "streaming"),
        BenchRequest(steps, rounds, check_steps, threads=threads),
        report_folder,
    )


@bench.command("data")
@arguments.recipe
@arguments.overrides
@click.option("--steps", type=click.IntRange(min=2), default=50, show_default=True, help="Batches that are read.")
@click.option(
    "--h5py", "beside_h5py", is_flag=True, help="Read as many rows through h5py, interleaved, and print the ratio."
)
def bench_data(recipe: str, overrides: tuple[str, ...], steps: int, beside_h5py: bool) -> None:
    """Measure the data path of RECIPE without a model, up to batches of int64 ids.

    With data.sources it reads the shards' files, and checks the hash of each block at its first use; without, it
    takes synthetic rows from memory. GB/s count the rows as stored, mostly 2 bytes a token in files.
    """
    from weftrain.analysis.bench.data import batch_times_ms, beside_h5py_ms, what_is_read
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
    read = what_is_read(source, range(0, 2 * steps, 2) if beside_h5py else range(steps))
    bandwidth = gb(read.num_bytes / steps / middle * 1e3)
    click.echo(f"reads {read.words}")
    click.echo(f"{per_second / 1e6:,.2f} M tokens/s = {rows / middle * 1e3:,.0f} rows/s = {bandwidth}/s")
    click.echo(f"{middle:,.3f} ms a batch of {rows} rows ({spread})")
    click.echo(
        f"first batch {step_ms[0]:,.2f} ms; {warm} of {steps} batches were warm-up; dataset {source.dataset_id[:12]}"
    )
    if theirs_ms:
        ratio = statistics.median(theirs / ours for ours, theirs in zip(counted, theirs_ms[warm:], strict=True))
        by_h5py = file.recipe.tokens_per_step / statistics.median(theirs_ms[warm:]) * 1e3
        click.echo(
            f"h5py, row by row: {by_h5py / 1e6:,.2f} M tokens/s; the median ratio of a pair of batches is {ratio:.1f}"
        )


for _command in (bench_compare, bench_submission, bench_verify, bench_mlperf):
    bench.add_command(_command)


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
@click.option("--backend", help="Backend instead of the recipe's.")
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
    backend: str | None,
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
    command += [] if backend is None else ["--backend", backend]
    console = Console()
    chosen = combinations(vary)
    _refuse_if_all_fail(recipe, overrides, backend, chosen)
    with Bar(console, "sweep", len(chosen)) as bar:
        rows = run_sweep(command, chosen, folder, timeout_s, lambda done, words: bar.update(done, words))
    best = max(
        (row for row in rows if row["tokens_per_second"]), key=lambda row: float(row["tokens_per_second"]), default=None
    )
    keys = [key for key, _ in chosen[0]]
    table = Table(*keys, "tokens/s", "step ms", "MFU", "memory GiB", "", box=None)
    for row in rows:
        if row["tokens_per_second"]:
            share = row["mfu_measured"]
            figures = [f"{float(row['tokens_per_second']):,.1f}", f"{float(row['step_ms_p50']):,.1f}"]
            figures += [
                share if share == "unknown" else f"{float(share):.1%}",
                f"{float(row['peak_memory_bytes']) / 2**30:,.2f}",
            ]
            words = "best" if row is best else ""
        else:
            figures, words = ["-"] * 4, row["error"]
        table.add_row(*(row[key] for key in keys), *figures, words, style="bold" if row is best else None)
    console.print(table)
    console.print(f"all figures: {folder / 'sweep.csv'}")


def _refuse_if_all_fail(
    recipe: str, overrides: Sequence[str], backend: str | None, chosen: Sequence[Combination]
) -> None:
    """Raise the first error where no combination can be, as with a misspelt key; else a row says it."""
    first: RecipeError | BackendError | None = None
    for combination in chosen:
        try:
            resolve(recipe, (*overrides, *(f"{key}={value}" for key, value in combination)), backend)
        except (RecipeError, BackendError) as error:
            first = first or error
        else:
            return
    if first is not None:
        raise first


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
        launch(ranks, 1)
    found = measure_ranks(ranks, largest_mib, disk)
    if found is None:
        return  # rank 0 prints
    for line in machine_lines(found):
        click.echo(line)
    if json_file is not None:
        fsops.write_bytes(json_file, json.dumps(found, indent=1).encode() + b"\n")
