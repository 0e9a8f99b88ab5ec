"""Measures how far results move when one kind of entry of the fingerprint changes, and writes the table of what a
replay allows: exchange/release/measured_differences.json.

    python -m weftrain.cli.numeric_differences --seeds 2 --to exchange/release/measured_differences.json
    python -m weftrain.cli.numeric_differences crystal_demo data.sources=[] data.synthetic_rows=512 schedule.steps=32

The first makes the table again: models of two families at three paces, in fp32 and bf16, from two seeds. The second
measures one recipe as it is. Each is trained once as it is (local, one thread) and once with each difference, in
processes of their own; the distances are those that `weftrain replay` would print of a link of 1, 2, 4 .. steps, the
largest of any seed. The file is written again after each difference, those that matter most first, so that a table of
fewer can be had in less time: it says which it has.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from weftrain.cli.rank_processes import run_ranks

BASE: tuple[str, ...] = ("backend.name=local", "backend.options={device: cpu, threads: 1}")
STEPS = (1, 2, 4, 8, 16, 32)
# The table's recipes: two layers of the demos' own width. Narrower ones understate what moves these: at width 64 a
# bound would be a tenth to a hundredth of what differs here (docs/measurements.md).
_SMALL = (
    *("data.sources=[]", "data.synthetic_rows=512", "data.sequence_length=64"),
    *("model.num_layers=2", "model.vocab_size=512"),
    *("batch.global_batch_size=4", "batch.micro_batch_size=2", f"schedule.steps={STEPS[-1]}"),
)
RECIPES: Mapping[str, tuple[tuple[str, ...], float]] = {
    "crystal_demo": (_SMALL, 0.012),
    "llama_demo": (_SMALL, 0.003),
}
# Share of the demo's peak rate, which is constant here: no pace is faster than that from a first step of AdamW.
PACES: Mapping[str, float] = {"slow": 0.1, "middle": 0.3, "full": 1.0}


class Variant(NamedTuple):
    """A difference: its row, in words, overrides of the recipe, environment, and number of processes."""

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
    _kernels("reference"),
    Variant("instruction set", "ATen without vectors", (), {"ATEN_CPU_CAPABILITY": "default"}),
    _cuda("ddp", 2),
    _kernels("torch"),
    _cuda("fsdp", 1),
    Variant("instruction set", "AVX2", (), {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    _cuda("fsdp", 2),
    _threads(4),
    Variant("layout", "streaming", ("backend.name=streaming",)),
    _cuda("ddp", 1),
    Variant("instruction set", "oneDNN with SSE4.1", (), {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
)
_ALL = (Variant("", "the recipe as it is"), *VARIANTS)  # a process is told the number of the one that it trains
COMPUTES = ("float32", "bfloat16")


class Asked(NamedTuple):
    """What is trained, from seeds 1 .. `seeds`: RECIPES where `recipe` is None. only: rows, or differences of them,
    that are measured; none: all.
    """

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    only: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        named = [] if self.recipe is None else [self.recipe, *self.overrides]
        only = (f"--only={name}" for name in self.only)
        return ["-m", "weftrain.cli.numeric_differences", *named, "--seeds", str(self.seeds), *only]

    @property
    def variants(self) -> list[Variant]:
        return [one for one in VARIANTS if not self.only or {one.row, one.what} & set(self.only)]


class Case(NamedTuple):
    """A run: of a recipe at a pace, in a dtype, from a seed."""

    pace: str
    compute: str
    recipe: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.pace}/{self.compute}/{self.recipe}/{self.seed}"


def cases(asked: Asked) -> Iterator[Case]:
    for seed in range(1, asked.seeds + 1):
        for compute in COMPUTES:
            more = (f"precision.compute={compute}", f"seed={seed}")
            if asked.recipe is not None:
                yield Case("as given", compute, asked.recipe, seed, (*BASE, *asked.overrides, *more))
                continue
            for recipe, (overrides, peak) in RECIPES.items():
                for pace, share in PACES.items():
                    rate = f"schedule.learning_rate=[{{shape: constant, steps: 100000, start: {peak * share:g}}}]"
                    yield Case(pace, compute, recipe, seed, (*BASE, *overrides, rate, *more))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--only", multiple=True, help="Row, or difference of it, to measure (repeatable).  [default: all]")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Each is a run of its own.")
@click.option("--to", type=click.Path(path_type=Path), help="File for what is found, in JSON.")
@click.option("--one", type=click.Path(path_type=Path), hidden=True, help="Folder for the results of this process.")
@click.option("--number", type=int, default=0, hidden=True, help="Of the variant that it trains.")
def main(
    recipe: str | None,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    seeds: int,
    to: Path | None,
    one: Path | None,
    number: int,
) -> None:
    """Train RECIPE, or the table's recipes, with each kind of difference, and print how far results end from those
    without.
    """
    asked = Asked(recipe, overrides, seeds, only)
    if one is not None:
        _take_part(asked, _ALL[number], one)
        return
    for name in set(only) - {word for variant in VARIANTS for word in (variant.row, variant.what)}:
        known = ", ".join(dict.fromkeys(variant.row for variant in VARIANTS))
        raise click.UsageError(
            f"--only {name}: there are the rows {known}, and the differences that are printed of them"
        )
    with tempfile.TemporaryDirectory(prefix="weftrain-differences-") as folder:
        found, done, paces = Figures(), list[Variant](), dict[str, list[float]]()
        for variant, figures in measure(asked, Path(folder)):
            for pace, compute, kind, distances in _flat(figures):
                numbers_there = ", ".join(f"{distance:.1e}" for distance in distances)
                click.echo(f"{variant.row} ({variant.what}), {pace}, {compute}, {kind}: {numbers_there}")
            if not figures:
                click.echo(f"{variant.row} ({variant.what}): every bit is equal")
            _keep_largest(found, variant.row, figures)
            done.append(variant)
            if to is not None:
                paces = paces or moved(Path(folder) / "0")
                _write(asked, done, found, paces, to)
        if to is not None and recipe is None:
            click.echo(page(to))


# pace -> compute -> (row ->) kind -> the largest distance after each of STEPS
Figures = dict[str, dict[str, Any]]


def _flat(figures: Figures) -> Iterator[tuple[str, str, str, list[float]]]:
    for pace, computes in figures.items():
        for compute, kinds in computes.items():
            for kind, distances in kinds.items():
                yield pace, compute, kind, distances


def _keep_largest(found: Figures, row: str, figures: Figures) -> None:
    for pace, compute, kind, distances in _flat(figures):
        kinds = found.setdefault(pace, {}).setdefault(compute, {}).setdefault(row, {})
        kinds[kind] = [max(pair) for pair in zip(kinds.get(kind, distances), distances, strict=True)]


def _write(asked: Asked, done: Sequence[Variant], found: Figures, paces: Mapping[str, list[float]], to: Path) -> None:
    import torch

    from weftrain.core.formats import fsops

    what: dict[str, list[str]] = {}
    for variant in done:
        what.setdefault(variant.row, []).append(variant.what)
    written = {
        "command": shlex.join(["python", *asked.command]),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "recipes": {recipe: list(overrides) for recipe, (overrides, _) in RECIPES.items()}
        if asked.recipe is None
        else {asked.recipe: list(asked.overrides)},
        **size(asked),
        "measured": what,
        "steps": list(STEPS[: max(map(len, paces.values()))]),
        "moved": paces,
        "distances": found,
    }
    fsops.write_bytes(to, (_json(written) + "\n").encode())


def page(table: Path) -> str:
    """The rows of docs/examine-a-release.md, in Markdown: of each dtype and pace the largest distances of any kind."""
    from weftrain.exchange.release.tolerance import WIDEST, read_table

    known = read_table(table)
    kinds = [kind for kind in WIDEST if kind != "held-out loss"]
    lines = [f"| dtype, pace | steps | moved | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    for compute in COMPUTES:
        for pace, moved in known.moved.items():
            for number, step in [(at, step) for at, step in enumerate(known.steps) if step in (1, 8, 32)]:
                numbers = (known.distance(pace, compute, kind, step) for kind in kinds)
                row = [f"{compute}, {pace}", str(step), f"{moved[number]:.2g}", *(f"{one:.1e}" for one in numbers)]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def size(asked: Asked) -> dict[str, int]:
    """Width and number of layers of the largest model that is trained."""
    from weftrain.core.recipe_file import load_recipe

    models = [load_recipe(case.recipe, list(case.overrides)).recipe.model for case in cases(asked)]
    return {"width": max(one.hidden_size for one in models), "layers": max(one.num_layers for one in models)}


def _json(value: Any, depth: int = 0) -> str:
    """JSON with a line for each entry, but a list of numbers on one line."""
    if not isinstance(value, dict):
        return json.dumps(
            [float(f"{one:.2g}") if isinstance(one, float) else one for one in value]
            if isinstance(value, list)
            else value
        )
    lines = [f"{' ' * (depth + 1)}{json.dumps(key)}: {_json(one, depth + 1)}" for key, one in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def measure(asked: Asked, folder: Path) -> Iterator[tuple[Variant, Figures]]:
    """Each variant, when it has run, with its distances. Raises ClickException for a run that fails."""
    _start(asked, _ALL[0], folder)
    for variant in asked.variants:
        _start(asked, variant, folder)
        other = folder / str(_ALL.index(variant))
        yield variant, largest(folder / "0", other)
        shutil.rmtree(other)  # the states of all its runs are gigabytes


def largest(base: Path, other: Path) -> Figures:
    """Between the results of two calls of `train_all`, of the kinds that differ."""
    found: Figures = {}
    for lines in sorted(base.rglob("lines.json")):
        place = lines.parent
        pace, compute = place.relative_to(base).parts[:2]
        for kind, there in distances(place, other / place.relative_to(base)).items():
            kinds = found.setdefault(pace, {}).setdefault(compute, {})
            kinds[kind] = [max(pair) for pair in zip(kinds.get(kind, there), there, strict=True)]
    return found


def distances(base: Path, other: Path) -> dict[str, list[float]]:
    """Between the results of two runs, kind by kind, as a replay measures them of a link that ends after each of STEPS:
    of the kinds that differ.
    """
    from safetensors.torch import load_file

    from weftrain.exchange.release.distance import MeasuredLines, state_distances

    told = [json.loads((place / "lines.json").read_bytes()) for place in (other, base)]
    start, found, lines = load_file(base / "start"), dict[str, list[float]](), MeasuredLines()
    ends = [step for step in STEPS if (base / f"end-{step}").exists()]
    for number, step in enumerate(ends):
        for there, here in zip(*(one[ends[number - 1] if number else 0 : step] for one in told), strict=True):
            lines.compare(there, here)
        states = (load_file(place / f"end-{step}") for place in (other, base))
        for kind, distance in (state_distances(start, *states) | lines.distances).items():
            found.setdefault(kind, [0.0] * len(ends))[number] = distance
    return {kind: there for kind, there in found.items() if any(there)}


def moved(base: Path) -> dict[str, list[float]]:
    """Pace -> the largest share of their norm by which a run at that pace had moved its weights after each of STEPS."""
    from safetensors.torch import load_file

    from weftrain.exchange.release.distance import movement

    found: dict[str, list[float]] = {}
    for lines in sorted(base.rglob("lines.json")):
        place = lines.parent
        start = load_file(place / "start")
        ends = (place / f"end-{step}" for step in STEPS)
        there = [movement(start, load_file(end)) for end in ends if end.exists()]
        pace = place.relative_to(base).parts[0]
        found[pace] = [max(pair) for pair in zip(found.get(pace, there), there, strict=True)]
    return found


def _start(asked: Asked, variant: Variant, folder: Path) -> None:
    """Train with this difference, in processes of its own."""
    command = [sys.executable, *asked.command, "--one", str(folder), "--number", str(_ALL.index(variant))]
    told = run_ranks(command, variant.ranks, variant.environment)
    if told is not None:
        raise click.ClickException(f"{variant.what}: {told}")


def _take_part(asked: Asked, variant: Variant, folder: Path) -> None:
    """Be one of the processes: rank 0 leads, and others follow in all its runs."""
    from weftrain.cli.assembly import open_data
    from weftrain.cli.resolve import backend_options
    from weftrain.core.backend import Follower, Job, Plan
    from weftrain.core.recipe_file import load_recipe

    if os.environ["RANK"] != "0":
        first = next(cases(asked))
        file = load_recipe(first.recipe, [*first.overrides, *variant.overrides])
        backend, options = backend_options(file)
        assert isinstance(backend, Follower)
        job = Job(file.recipe, Plan(0, file.recipe.schedule.steps), options, folder=folder)
        backend.run_worker(lambda: job, lambda job: open_data(job.recipe)[0], 0)
        return
    train_all(asked, variant.overrides, folder / str(_ALL.index(variant)))


def train_all(asked: Asked, overrides: Sequence[str], folder: Path) -> None:
    """Of each case write start, end-1, end-2 .. (safetensors) and lines.json, in a folder of its own. overrides: of a
    variant.
    """
    for case in cases(asked):
        place = folder / case.place
        place.mkdir(parents=True)
        _train(case, overrides, place)


def _train(case: Case, overrides: Sequence[str], folder: Path) -> None:
    from safetensors.torch import save_file

    from weftrain.cli.assembly import open_data
    from weftrain.cli.resolve import backend_options
    from weftrain.core.backend import Job, Plan
    from weftrain.core.recipe_file import load_recipe
    from weftrain.core.run.prepare import prepare_run

    file = load_recipe(case.recipe, [*case.overrides, *overrides])
    backend, options = backend_options(file)
    (folder / "run").mkdir()
    run = prepare_run(backend, Job(file.recipe, Plan(0, file.recipe.schedule.steps), options, folder=folder / "run"))
    try:
        save_file(_copied(run.export_state()), folder / "start")
        lines: list[dict[str, Any]] = []
        for result in run.train(open_data(file.recipe)[0]):
            numbers = {"loss": float(result.loss), "grad_norm": float(result.grad_norm)}
            lines.append({"kind": "step", "step": result.step + 1, **numbers})
            if result.step + 1 in STEPS:
                save_file(_copied(run.export_state()), folder / f"end-{result.step + 1}")
    finally:
        run.close()
    (folder / "lines.json").write_text(json.dumps(lines))


def _copied(state: Any) -> dict[str, Any]:
    return {name: state.tensors[name].clone() for name in state.tensors}


if __name__ == "__main__":
    main()
