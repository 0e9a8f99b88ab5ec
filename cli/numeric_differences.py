"""Measures how far results move when one kind of entry of the fingerprint changes: the rows of
exchange/release/distance.py.

    python -m weftrain.cli.numeric_differences crystal_demo data.sources=[] data.synthetic_rows=512 --seeds 2 --links 3

trains the recipe as it is (local, one thread) and once with each difference, from each seed and in fp32 and bf16, and
prints the distances that `weftrain replay` would print: the largest of any seed, at the end of any of the links that
the steps are cut into. Each difference has processes of its own, since threads and instruction sets are chosen when a
process starts.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from weftrain.cli.rank_processes import run_ranks

BASE: tuple[str, ...] = ("backend.name=local", "backend.options={device: cpu, threads: 1}")


class Variant(NamedTuple):
    """A difference: its row, in words, overrides of the recipe, environment, and processes."""

    row: str
    what: str
    overrides: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    ranks: int = 1


def _threads(count: int) -> Variant:
    return Variant("threads", f"{count} threads", (f"backend.options={{device: cpu, threads: {count}}}",))


def _kernels(*preferences: str) -> Variant:
    order = ", ".join(dict.fromkeys((*preferences, "reference")))
    return Variant("kernels", preferences[0], (f"kernels.preferences=[{order}]",))


def _cuda(parallel: str, ranks: int) -> Variant:
    options = f"backend.options={{device: cpu, threads: 1, parallel: {parallel}}}"
    what = f"cuda, {parallel}, {ranks} rank{'s' * (ranks > 1)}"
    return Variant("layout", what, ("backend.name=cuda", options, f"batch.replicas={ranks}"), {}, ranks)


VARIANTS: tuple[Variant, ...] = (
    _threads(2),
    _threads(4),
    Variant("instruction set", "ATen without vectors", (), {"ATEN_CPU_CAPABILITY": "default"}),
    Variant("instruction set", "AVX2", (), {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Variant("instruction set", "oneDNN with SSE4.1", (), {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    _kernels("reference"),
    _kernels("torch"),
    _kernels("cpp", "torch"),
    Variant("layout", "streaming", ("backend.name=streaming",)),
    _cuda("fsdp", 1),
    _cuda("ddp", 1),
    _cuda("fsdp", 2),
    _cuda("ddp", 2),
)
COMPUTES = ("float32", "bfloat16")


class Asked(NamedTuple):
    """What is trained: a recipe, from seeds 1 .. `seeds`, whose steps are cut into `links`."""

    recipe: str
    overrides: tuple[str, ...]
    seeds: int = 1
    links: int = 1


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--only", multiple=True, help="Row to measure (repeatable).  [default: all]")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Each is a run of its own.")
@click.option("--links", default=1, show_default=True, type=click.IntRange(min=1), help="Parts of the steps.")
@click.option("--to", type=click.Path(path_type=Path), help="File for what is found, in JSON.")
@click.option("--one", type=click.Path(path_type=Path), hidden=True, help="Folder for the results of this process.")
def main(
    recipe: str,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    seeds: int,
    links: int,
    to: Path | None,
    one: Path | None,
) -> None:
    """Train RECIPE with each kind of difference, and print how far its results end from those without."""
    asked = Asked(recipe, overrides, seeds, links)
    if one is not None:
        _take_part(asked, one)
        return
    chosen = [variant for variant in VARIANTS if not only or variant.row in only]
    if not chosen:
        known = ", ".join(dict.fromkeys(variant.row for variant in VARIANTS))
        raise click.UsageError(f"--only {only[0]}: there are the rows {known}")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="weftrain-differences-") as folder:
        for variant, apart in measure(asked, chosen, Path(folder)):
            rows.setdefault(variant.row, {})[variant.what] = apart
            for compute, distances in apart.items():
                numbers = ", ".join(f"{kind} {distance:.1e}" for kind, distance in distances.items())
                click.echo(f"{variant.row} ({variant.what}), {compute}: {numbers or 'every bit is equal'}")
    if to is not None:
        _write(asked, rows, to)


def _write(asked: Asked, rows: Mapping[str, Any], to: Path) -> None:
    import torch

    from weftrain.core.formats import fsops

    command = ["python -m weftrain.cli.numeric_differences", asked.recipe, *asked.overrides]
    command += [f"--seeds {asked.seeds}", f"--links {asked.links}"]
    written = {"command": " ".join(command), "torch": torch.__version__, "rows": rows}
    fsops.write_bytes(to, (json.dumps(written, indent=1) + "\n").encode())


def measure(
    asked: Asked, variants: Sequence[Variant], folder: Path
) -> Iterator[tuple[Variant, dict[str, dict[str, float]]]]:
    """Each variant, when it has run: compute dtype -> kind -> largest distance, of those that differ. Raises
    ClickException for a run that fails.
    """
    _start(asked, Variant("", ""), folder / "base")
    for number, variant in enumerate(variants):
        _start(asked, variant, folder / str(number))
        yield variant, largest(folder / "base", folder / str(number))


def largest(base: Path, other: Path) -> dict[str, dict[str, float]]:
    """Between the results of two calls of `train_all`."""
    found: dict[str, dict[str, float]] = {compute: {} for compute in COMPUTES}
    for place in sorted(path for path in base.glob("*/*") if path.is_dir()):
        into = found[place.parent.name]
        for kind, distance in distances(place, other / place.relative_to(base)).items():
            into[kind] = max(into.get(kind, 0.0), distance)
    return found


def distances(base: Path, other: Path) -> dict[str, float]:
    """Between the results of two runs, kind by kind, as a replay measures them at the end of each link: the largest, of
    the kinds that differ.
    """
    from safetensors.torch import load_file

    from weftrain.exchange.release.distance import MeasuredLines, state_distances

    lines = MeasuredLines()
    for there, here in zip(*(json.loads((place / "lines.json").read_bytes()) for place in (base, other)), strict=True):
        lines.compare(there, here)
    apart, start = dict(lines.distances), load_file(base / "start")
    for end in sorted(base.glob("end-*")):
        for kind, distance in state_distances(start, load_file(end), load_file(other / end.name)).items():
            apart[kind] = max(apart.get(kind, 0.0), distance)
    return {kind: distance for kind, distance in apart.items() if distance}


def _start(asked: Asked, variant: Variant, folder: Path) -> None:
    """Train with a difference, in processes of its own."""
    folder.mkdir()
    command = [sys.executable, "-m", "weftrain.cli.numeric_differences", asked.recipe, *asked.overrides]
    command += [*variant.overrides, "--seeds", str(asked.seeds), "--links", str(asked.links), "--one", str(folder)]
    told = run_ranks(command, variant.ranks, variant.environment)
    if told is not None:
        raise click.ClickException(f"{variant.what or 'the recipe as it is'}: {told}")


def _take_part(asked: Asked, folder: Path) -> None:
    """Be one of the processes: rank 0 leads, and others follow in all its runs."""
    from weftrain.cli.assembly import open_data
    from weftrain.cli.resolve import backend_options
    from weftrain.core.backend import Follower, Job, Plan
    from weftrain.core.recipe_file import load_recipe

    file = load_recipe(asked.recipe, [*BASE, *asked.overrides])
    backend, options = backend_options(file)
    if os.environ["RANK"] != "0" and isinstance(backend, Follower):
        job = Job(file.recipe, Plan(0, file.recipe.schedule.steps), options, folder=folder)
        backend.run_worker(lambda: job, lambda job: open_data(job.recipe)[0], 0)
    else:
        train_all(asked, folder)


def train_all(asked: Asked, folder: Path) -> None:
    """Of each dtype and seed write start, end-1 .. (safetensors) and lines.json, in folders <compute>/<seed>."""
    for compute in COMPUTES:
        for seed in range(1, asked.seeds + 1):
            place = folder / compute / str(seed)
            place.mkdir(parents=True)
            more = (f"precision.compute={compute}", f"seed={seed}")
            _train(asked._replace(overrides=(*BASE, *asked.overrides, *more)), place)


def _train(asked: Asked, folder: Path) -> None:
    from safetensors.torch import save_file

    from weftrain.cli.assembly import open_data
    from weftrain.cli.resolve import backend_options
    from weftrain.core.backend import Job, Plan
    from weftrain.core.recipe_file import load_recipe
    from weftrain.core.run.prepare import prepare_run

    file = load_recipe(asked.recipe, list(asked.overrides))
    steps = file.recipe.schedule.steps
    ends = {steps * link // asked.links: link for link in range(1, asked.links + 1)}
    backend, options = backend_options(file)
    (folder / "run").mkdir()
    run = prepare_run(backend, Job(file.recipe, Plan(0, steps), options, folder=folder / "run"))
    try:
        save_file(_copied(run.export_state()), folder / "start")
        lines: list[dict[str, Any]] = []
        for result in run.train(open_data(file.recipe)[0]):
            numbers = {"loss": float(result.loss), "grad_norm": float(result.grad_norm)}
            lines.append({"kind": "step", "step": result.step + 1, **numbers})
            if link := ends.get(result.step + 1):
                save_file(_copied(run.export_state()), folder / f"end-{link}")
    finally:
        run.close()
    (folder / "lines.json").write_text(json.dumps(lines))


def _copied(state: Any) -> dict[str, Any]:
    return {name: state.tensors[name].clone() for name in state.tensors}


if __name__ == "__main__":
    main()
