"""Measures what `precision.numerics: replayable` costs in each layout, against `fast`: a table of docs/same-bits.md.

    python -m weftrain.cli.replayable_cost crystal_demo batch.micro_batch_size=4 precision.compute=float32

Of each layout a group of processes of one thread trains both in turn, on synthetic rows. CPU seconds are those of all
its processes together, from the end of the warm-up to the end of the last step: on a busy machine they say more than
the clock does.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from weftrain.cli.rank_processes import run_ranks

if TYPE_CHECKING:
    from weftrain.core.backend import Backend, Job


class Layout(NamedTuple):
    ranks: int
    overrides: tuple[str, ...]
    of_a_row: int = 1  # ranks that share one


def _cuda(parallel: str, *more: str) -> Layout:
    options = ", ".join(["device: cpu", "threads: 1", f"parallel: {parallel}", *more])
    return Layout(2, ("backend.name=cuda", f"backend.options={{{options}}}"))


def _in_parts(layout: Layout, parts: int, of_a_row: int = 1) -> Layout:
    """Linear maps in parts; `fast` computes them whole."""
    return Layout(layout.ranks, (*layout.overrides, f"precision.tensor_parts={parts}"), of_a_row)


def _streaming(ranks: int, fabric: str = "central") -> Layout:
    options = f"backend.options={{device: cpu, threads: 1, tier: ram, fabric: {fabric}}}"
    return Layout(ranks, ("backend.name=streaming", options))


_LOCAL = Layout(1, ("backend.name=local", "backend.options={device: cpu, threads: 1}"))
LAYOUTS: Mapping[str, Layout] = {
    "local": _LOCAL,
    "local, 2 parts": _in_parts(_LOCAL, 2),
    "local, 4 parts": _in_parts(_LOCAL, 4),
    "cuda, ddp, 2 ranks": _cuda("ddp"),
    "cuda, fsdp, 2 ranks": _cuda("fsdp"),
    "cuda, hsdp, 2 ranks": _cuda("hsdp", "shard_group: 1"),
    "cuda, 2 tensor ranks, 2 parts": _in_parts(_cuda("fsdp", "tensor_parallel: 2"), 2, of_a_row=2),
    "streaming": _streaming(1),
    "streaming, 2 replicas": _streaming(2),
    "streaming, 2 sharded replicas": _streaming(2, "sharded"),
}
NUMERICS = {
    "fast": ("precision.numerics=fast", "precision.tensor_parts=1"),
    "replayable": ("precision.numerics=replayable",),
}
WARM_UP = 1  # steps


class Round(NamedTuple):
    """Seconds of the measured steps of one run."""

    cpu_s: float
    wall_s: float


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--only", multiple=True, type=click.Choice(list(LAYOUTS)), help="Layout (repeatable).  [default: all]")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Of both numerics in turn.")
@click.option("--steps", default=4, show_default=True, type=click.IntRange(min=1), help="Measured steps of a round.")
@click.option("--one", type=click.Path(path_type=Path), hidden=True, help="Folder of the group of this one process.")
def main(
    recipe: str, overrides: tuple[str, ...], only: tuple[str, ...], rounds: int, steps: int, one: Path | None
) -> None:
    """Train RECIPE in each layout with both numerics in turn, and print medians and their ratios."""
    if one is not None:
        _take_part(recipe, overrides, rounds, steps, one)
        return
    click.echo("layout: CPU seconds a step, fast -> replayable; ratio of CPU seconds, ratio of time (medians)")
    for name in only or LAYOUTS:
        found = measure(recipe, overrides, LAYOUTS[name], rounds, steps)
        cpu = {numerics: statistics.median(one.cpu_s for one in found[numerics]) / steps for numerics in NUMERICS}
        ratios = [
            statistics.median(
                getattr(slow, what) / getattr(fast, what) for fast, slow in zip(*found.values(), strict=True)
            )
            for what in Round._fields
        ]
        click.echo(f"{name}: {cpu['fast']:.3f} -> {cpu['replayable']:.3f}; {ratios[0]:.3f}, {ratios[1]:.3f}")


def measure(recipe: str, overrides: Sequence[str], layout: Layout, rounds: int, steps: int) -> dict[str, list[Round]]:
    """Numerics -> its rounds. Raises ClickException for a group that fails."""
    asked = [recipe, *layout.overrides, f"batch.replicas={layout.ranks // layout.of_a_row}", *overrides]
    with tempfile.TemporaryDirectory(prefix="weftrain-replayable-") as folder:
        command = [sys.executable, "-m", "weftrain.cli.replayable_cost", *asked]
        command += ["--rounds", str(rounds), "--steps", str(steps), "--one", folder]
        told = run_ranks(command, layout.ranks, {"OMP_NUM_THREADS": "1"})
        if told is not None:
            raise click.ClickException(f"{layout.overrides[0]}: a process failed:\n{told}")
        rows = json.loads((Path(folder) / "rounds.json").read_text())
    return {numerics: [Round(*row) for row in rows[numerics]] for numerics in NUMERICS}


def _take_part(recipe: str, overrides: Sequence[str], rounds: int, steps: int, folder: Path) -> None:
    """Be a rank of a group, for all its runs; rank 0 writes rounds.json."""
    from weftrain.analysis.bench.train import bench_source
    from weftrain.core.backend import Follower

    found: dict[str, list[Round]] = {numerics: [] for numerics in NUMERICS}
    leads, served = os.environ["RANK"] == "0", False
    for number in range(rounds):
        for numerics in NUMERICS if number % 2 else reversed(NUMERICS):
            backend, job = _job(recipe, [*overrides, *NUMERICS[numerics]], steps, folder / f"{number}-{numerics}")
            if leads:
                found[numerics].append(_round(backend, job, steps))
            elif isinstance(backend, Follower) and not served:
                backend.run_worker(lambda job=job: job, lambda job: bench_source(job.recipe), 60)  # type: ignore[misc]
                served = backend.follows()  # of a launcher's ranks one call is for all runs
    if leads:
        (folder / "rounds.json").write_text(json.dumps(found))


def _job(recipe: str, overrides: Sequence[str], steps: int, folder: Path) -> tuple[Backend, Job]:
    from weftrain.cli.resolve import backend_options
    from weftrain.core.backend import Job, Plan
    from weftrain.core.recipe_file import load_recipe

    folder.mkdir(exist_ok=True)
    file = load_recipe(recipe, ["data.sources=[]", "data.synthetic_rows=64", *overrides])
    backend, options = backend_options(file)
    return backend, Job(file.recipe, Plan(0, WARM_UP + steps), options, folder=folder)


def _round(backend: Backend, job: Job, steps: int) -> Round:
    from weftrain.analysis.bench.train import bench_source
    from weftrain.core.run.prepare import prepare_run

    run = prepare_run(backend, job)
    try:
        results = run.train(bench_source(job.recipe))
        for _ in range(WARM_UP):
            float(next(results).loss)
        before = _group_cpu_s(), time.perf_counter()
        for _ in range(steps):
            float(next(results).loss)
        return Round(_group_cpu_s() - before[0], time.perf_counter() - before[1])
    finally:
        run.close()


def _group_cpu_s() -> float:
    """CPU seconds so far of all processes that this one's parent started."""
    parent, ticks = str(os.getppid()), 0
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[1] == parent:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
