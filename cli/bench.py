"""`weftrain bench`: how fast, measured so that the figure can be trusted."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table


@click.group()
def bench() -> None:
    """Measure speed."""


@bench.command("train")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--steps", type=click.IntRange(min=2), default=14, show_default=True, help="Steps of each round, warm-up included.")
@click.option("--warmup", type=click.IntRange(min=1), default=4, show_default=True, help="First steps that are not counted.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads (backend.options.threads).")
@click.option("--against", metavar="COMMAND", help="Run this program in turns with ours; a .py file is run with this Python.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds of each program, with --against.")
@click.option("--timeout", "timeout_s", type=float, default=900.0, show_default=True, help="Seconds for one round of one program.")
def bench_train(
    recipe: str, overrides: tuple[str, ...], steps: int, warmup: int, threads: int, against: str | None, rounds: int, timeout_s: float
) -> None:
    """Training throughput of RECIPE on fixed random rows, as a line `RESULT {json}`.

    With --against, the two programs alternate, each round in a process of its own, and the ratio is printed.
    """
    from weftrain.analysis.bench_train import RESULT_PREFIX, compare, run_program

    if warmup >= steps:
        raise click.BadParameter("--warmup must be less than --steps")
    if against is None:
        click.echo(RESULT_PREFIX + json.dumps(_measure(recipe, overrides, steps, warmup, threads)))
        return
    theirs_command = shlex.split(against)
    if theirs_command and theirs_command[0].endswith(".py"):
        theirs_command = [sys.executable, *theirs_command]
    numbers = ["--steps", str(steps), "--warmup", str(warmup), "--threads", str(threads)]
    ours_command = [sys.executable, "-m", "weftrain.cli", "bench", "train", recipe, *overrides, *numbers]
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        for command, results in ((ours_command, ours), (theirs_command, theirs)):
            result = run_program(command, timeout_s)
            results.append(result)
            click.echo(f"round {number}: {result['name']:<28} {result['tokens_per_second']:>8} tokens/s  {result['step_ms']:>8} ms a step")
    found = compare(ours, theirs)
    table = Table("", "tokens/s (median)", "step ms", "loss first", "loss last", box=None)
    for results in (ours, theirs):
        middle = [f"{statistics.median(result[key] for result in results):,.1f}" for key in ("tokens_per_second", "step_ms")]
        table.add_row(results[0]["name"], *middle, f"{results[0]['loss_first']:.4f}", f"{results[-1]['loss_last']:.4f}")
    Console(highlight=False).print(table)
    ratios = ", ".join(f"{ratio:.3f}" for ratio in found.ratios)
    click.echo(f"ratio of tokens/s: {found.median_ratio:.3f} (median of {ratios})")
    verdict = (
        "the same training" if found.loss_difference <= 1e-3 else "NOT the same training, or not the same start: read the ratio with care"
    )
    click.echo(f"losses differ by at most {found.loss_difference:.2g}: {verdict}")


def _measure(recipe: str, overrides: tuple[str, ...], steps: int, warmup: int, threads: int) -> dict[str, object]:
    from weftrain.analysis.bench_train import bench_source, measure, plain_weights
    from weftrain.analysis.peak import Peak
    from weftrain.cli.assembly import backend_options, measured_peak
    from weftrain.core.backend import Job, Plan
    from weftrain.core.recipe_file import load_recipe

    file = load_recipe(recipe, [*overrides, f"backend.options.threads={threads}"])
    backend, options = backend_options(file)
    source = bench_source(file.recipe)
    compiled = "-compile" if file.recipe.backend.options.get("compile") else ""
    name = f"weftrain-{backend.name}-{file.recipe.precision.compute}{compiled}"
    with tempfile.TemporaryDirectory(prefix="weftrain-bench-") as folder:  # for a backend that keeps state on disk
        run = backend.prepare(Job(file.recipe, Plan(0, steps), options, plain_weights(file.recipe.model), folder=Path(folder)))
        peak: Peak = measured_peak(file.recipe, backend, run)
        try:
            return measure(run, file.recipe, source, warmup, peak, name)
        finally:
            run.close()
