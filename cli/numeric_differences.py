"""Measures how far results move when one kind of entry of the fingerprint changes: the rows of
exchange/release/distance.py.

    python -m weftrain.cli.numeric_differences crystal_demo data.sources=[] data.synthetic_rows=512 schedule.steps=20

trains the recipe once as it is (local, one thread) and once with each difference, every run in a process of its own,
since threads and instruction sets are chosen when a process starts, and prints the distances that `weftrain replay`
would print.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

# row -> (what is changed, overrides of the recipe, environment)
BASE: tuple[str, ...] = ("backend.name=local", "backend.options={device: cpu, threads: 1}")
Variant = tuple[str, str, tuple[str, ...], Mapping[str, str]]
VARIANTS: tuple[Variant, ...] = (
    ("threads", "2 threads", ("backend.options={device: cpu, threads: 2}",), {}),
    ("instruction set", "ATen without vectors", (), {"ATEN_CPU_CAPABILITY": "default"}),
    ("instruction set", "AVX2", (), {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    ("instruction set", "oneDNN with SSE4.1", (), {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    ("kernels", "reference", ("kernels.preferences=[reference]",), {}),
    ("kernels", "torch", ("kernels.preferences=[torch, reference]",), {}),
    ("layout", "streaming", ("backend.name=streaming",), {}),
    ("layout", "cuda, fsdp", ("backend.name=cuda",), {}),
    ("layout", "cuda, ddp", ("backend.name=cuda", "backend.options={device: cpu, threads: 1, parallel: ddp}"), {}),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--only", multiple=True, help="Row to measure (repeatable).  [default: all]")
@click.option("--one", type=click.Path(path_type=Path), hidden=True, help="Folder for the result of this one process.")
def main(recipe: str, overrides: tuple[str, ...], only: tuple[str, ...], one: Path | None) -> None:
    """Train RECIPE with each kind of difference, and print how far its results end from those without."""
    if one is not None:
        _train(recipe, overrides, one)
        return
    chosen = [variant for variant in VARIANTS if not only or variant[0] in only]
    if not chosen:
        known = ", ".join(dict.fromkeys(variant[0] for variant in VARIANTS))
        raise click.UsageError(f"--only {only[0]}: there are the rows {known}")
    with tempfile.TemporaryDirectory(prefix="weftrain-differences-") as folder:
        for (row, what, _, _), apart in measure(recipe, overrides, chosen, Path(folder)):
            numbers = ", ".join(f"{kind} {distance:.1e}" for kind, distance in apart.items())
            click.echo(f"{row} ({what}): {numbers or 'every bit is equal'}")


def measure(
    recipe: str, overrides: Sequence[str], variants: Sequence[Variant], folder: Path
) -> Iterator[tuple[Variant, dict[str, float]]]:
    """Each variant, when it has run: kind -> distance, of those that differ. Raises ClickException for a run that
    fails.
    """
    base = [*BASE, *overrides]
    _start(recipe, base, {}, folder / "base")
    for number, variant in enumerate(variants):
        _, _, more, environment = variant
        _start(recipe, [*base, *more], environment, folder / str(number))
        yield variant, distances(folder / "base", folder / str(number))


def distances(base: Path, other: Path) -> dict[str, float]:
    """Between the results of two processes of `_train`, kind by kind, as a replay measures them."""
    from safetensors.torch import load_file

    from weftrain.exchange.release.distance import MeasuredLines, state_distances

    lines = MeasuredLines()
    for there, here in zip(*(json.loads((place / "lines.json").read_bytes()) for place in (base, other)), strict=True):
        lines.compare(there, here)
    start, wanted, found = (load_file(place) for place in (base / "start", base / "end", other / "end"))
    apart = {**state_distances(start, wanted, found), **lines.distances}
    return {kind: distance for kind, distance in apart.items() if distance}


def _start(recipe: str, overrides: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    folder.mkdir()
    command = [sys.executable, "-m", "weftrain.cli.numeric_differences", recipe, *overrides, "--one", str(folder)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(
            f"{recipe} {' '.join(overrides)}: {(done.stderr.strip() or 'failed').splitlines()[-1]}"
        )


def _train(name: str, overrides: Sequence[str], folder: Path) -> None:
    """Write start, end (safetensors) and lines.json."""
    from safetensors.torch import save_file

    from weftrain.cli.assembly import open_data
    from weftrain.cli.resolve import backend_options
    from weftrain.core.backend import Job, Plan, State
    from weftrain.core.recipe_file import load_recipe
    from weftrain.core.run.prepare import prepare_run

    file = load_recipe(name, list(overrides))
    backend, options = backend_options(file)
    run = prepare_run(backend, Job(file.recipe, Plan(0, file.recipe.schedule.steps), options, folder=folder))
    try:
        save_file(_copied(run.export_state()), folder / "start")
        lines: list[dict[str, Any]] = []
        for result in run.train(open_data(file.recipe)[0]):
            numbers = {"loss": float(result.loss), "grad_norm": float(result.grad_norm)}
            lines.append({"kind": "step", "step": result.step + 1, **numbers})
        state: State = run.export_state()
        save_file(_copied(state), folder / "end")
    finally:
        run.close()
    (folder / "lines.json").write_text(json.dumps(lines))


def _copied(state: Any) -> dict[str, Any]:
    return {name: state.tensors[name].clone() for name in state.tensors}


if __name__ == "__main__":
    main()
