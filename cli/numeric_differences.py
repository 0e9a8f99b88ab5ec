"""Measures how far results move when one kind of entry of the fingerprint changes, and writes the table of what a
replay allows: exchange/release/measured_differences.json.

    python -m weftrain.cli.numeric_differences --seeds 2 --python torch-2.12.1/bin/python \
        --to exchange/release/measured_differences.json
    python -m weftrain.cli.numeric_differences crystal_demo data.sources=[] data.synthetic_rows=512 schedule.steps=32

The first makes the table again: models of two families at three paces, in fp32 and bf16, from two seeds. The second
measures one recipe as it is. Each is trained once as it is (local, one thread) and once with each difference, in
processes of their own; the distances are those that `weftrain replay` would print of a link of 1, 2, 4 .. steps, the
largest of any seed. Each --python is the interpreter of another environment, with this code and another torch, and one
more difference. The file is written again after each difference, the first seed's of all of them first, so that a table
of fewer can be had in less time: it says which it has. --add takes in the figures of earlier files, and with --seeds 0
nothing else.
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

from weftrain.cli.numeric_table import COMPUTES, STEPS, Figures, Measured, flat, page
from weftrain.cli.numeric_variants import AS_IS, BASE, VARIANTS, Variant, with_python
from weftrain.cli.rank_processes import run_ranks

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
_FINGERPRINT = "fingerprint.json"


class Asked(NamedTuple):
    """What is trained, from seeds 1 .. `seeds`: RECIPES where `recipe` is None. only: rows, or differences of them,
    that are measured; none: all. pythons: interpreters of other environments.
    """

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    only: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        named = [] if self.recipe is None else [self.recipe, *self.overrides]
        options = (*(f"--only={name}" for name in self.only), *(f"--python={name}" for name in self.pythons))
        return ["-m", "weftrain.cli.numeric_differences", *named, "--seeds", str(self.seeds), *options]

    def one(self, seed: int, variant: Variant, folder: Path) -> list[str]:
        """The command of a process that trains one seed with this difference, for results in `folder`."""
        named = [] if self.recipe is None else [self.recipe, *self.overrides]
        more = (f"--override={override}" for override in variant.overrides)
        process = ["-m", "weftrain.cli.numeric_differences", *named, "--one", str(folder), "--seeds", str(seed), *more]
        return [variant.python or sys.executable, *process]


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


def cases(asked: Asked, seed: int) -> Iterator[Case]:
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
@click.option("--python", "pythons", multiple=True, help="Interpreter with another torch and this code (repeatable).")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=0), help="Each is a run of its own.")
@click.option("--to", type=click.Path(path_type=Path), help="File for what is found, in JSON.")
@click.option(
    *("--add", "adds"),
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of an earlier call, whose figures count too (repeatable).",
)
@click.option("--one", type=click.Path(path_type=Path), hidden=True, help="Be a process that trains the last seed.")
@click.option("--override", "more", multiple=True, hidden=True, help="With --one: of the recipe, of its difference.")
def main(
    recipe: str | None,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    pythons: tuple[str, ...],
    seeds: int,
    to: Path | None,
    adds: tuple[Path, ...],
    one: Path | None,
    more: tuple[str, ...],
) -> None:
    """Train RECIPE, or the table's recipes, with each kind of difference, and print how far results end from those
    without.
    """
    asked = Asked(recipe, overrides, seeds, only, pythons)
    if one is not None:
        _take_part(asked, more, one)
        return
    from weftrain.core.errors import RecipeError

    variants = chosen(asked) if seeds else []
    commands = [shlex.join(["python", *asked.command])] if seeds else []
    try:
        known = Measured(commands, _conditions(asked))
    except RecipeError as error:
        raise click.ClickException(str(error)) from error
    for file in adds:
        known.add(file)
    if to is not None and adds:
        known.write(to)
    with tempfile.TemporaryDirectory(prefix="weftrain-differences-") as folder:
        for variant, seed, figures in measure(asked, variants, Path(folder)):
            words = f"{variant.row} ({variant.what}), seed {seed}"
            for pace, compute, kind, distances in flat(figures):
                numbers_there = ", ".join(f"{distance:.1e}" for distance in distances)
                click.echo(f"{words}, {pace}, {compute}, {kind}: {numbers_there}")
            if not figures:
                click.echo(f"{words}: every bit is equal")
            known.keep(
                variant.row, variant.what, seed, figures, moved(Path(folder) / AS_IS) if variant is variants[0] else {}
            )
            if to is not None:
                known.write(to)
    if to is not None and recipe is None:
        click.echo(page(to))


def chosen(asked: Asked) -> list[Variant]:
    """The differences that are measured. Raises click's errors for a name that none has, and for an interpreter that
    cannot be used.
    """
    every = [*map(with_python, asked.pythons), *VARIANTS]
    for name in set(asked.only) - {word for variant in every for word in (variant.row, variant.what)}:
        known = ", ".join(dict.fromkeys(variant.row for variant in every))
        raise click.UsageError(
            f"--only {name}: there are the rows {known}, and the differences that are printed of them"
        )
    return [one for one in every if not asked.only or {one.row, one.what} & set(asked.only)]


def _conditions(asked: Asked) -> dict[str, Any]:
    """What a file says of the runs as they are."""
    import torch

    return {
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "recipes": {recipe: list(overrides) for recipe, (overrides, _) in RECIPES.items()}
        if asked.recipe is None
        else {asked.recipe: list(asked.overrides)},
        **size(asked),
    }


def size(asked: Asked) -> dict[str, int]:
    """Width and number of layers of the largest model that is trained."""
    from weftrain.core.recipe_file import load_recipe

    models = [load_recipe(case.recipe, list(case.overrides)).recipe.model for case in cases(asked, 1)]
    return {"width": max(one.hidden_size for one in models), "layers": max(one.num_layers for one in models)}


def measure(asked: Asked, variants: Sequence[Variant], folder: Path) -> Iterator[tuple[Variant, int, Figures]]:
    """Each variant and seed, when it has run, with its distances. Raises ClickException for a run that fails, and for
    one whose fingerprint does not differ as its row says: it would measure something else.
    """
    base = folder / AS_IS
    for seed in range(1, asked.seeds + 1):
        _start(asked, seed, Variant("", AS_IS), base)
        for number, variant in enumerate(variants):
            other = folder / str(number)
            _start(asked, seed, variant, other)
            if variant.row not in (rows := differing_rows(base, other)):
                raise click.ClickException(
                    f"{variant.what}: its fingerprint differs in {', '.join(rows) or 'nothing'}, and not in "
                    f"{variant.row}: it is no such difference on this machine; leave it out with --only"
                )
            yield variant, seed, largest(base, other)
            shutil.rmtree(other)  # the states of all its runs are gigabytes
        shutil.rmtree(base)


def differing_rows(base: Path, other: Path) -> list[str]:
    """The rows of the entries in which any fingerprint of the runs of two processes differ."""
    from weftrain.core.run.run_folder import differences
    from weftrain.exchange.release.tolerance import rows_of

    pairs = ((one, other / one.relative_to(base)) for one in sorted(base.rglob(_FINGERPRINT)))
    return rows_of(entry for pair in pairs for entry in differences(*(json.loads(one.read_bytes()) for one in pair)))


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


def _start(asked: Asked, seed: int, variant: Variant, folder: Path) -> None:
    """Train with this difference, in processes of its own."""
    told = run_ranks(asked.one(seed, variant, folder), variant.ranks, variant.environment)
    if told is not None:
        raise click.ClickException(f"{variant.what}: {told}")


def _take_part(asked: Asked, overrides: Sequence[str], folder: Path) -> None:
    """Be one of the processes: rank 0 leads, and others follow in all its runs."""
    from weftrain.cli.assembly import open_data
    from weftrain.cli.resolve import backend_options
    from weftrain.core.backend import Follower, Job, Plan
    from weftrain.core.recipe_file import load_recipe

    if os.environ["RANK"] != "0":
        first = next(cases(asked, asked.seeds))
        file = load_recipe(first.recipe, [*first.overrides, *overrides])
        backend, options = backend_options(file)
        assert isinstance(backend, Follower)
        job = Job(file.recipe, Plan(0, file.recipe.schedule.steps), options, folder=folder)
        backend.run_worker(lambda: job, lambda job: open_data(job.recipe)[0], 0)
        return
    train_all(asked, asked.seeds, overrides, folder)


def train_all(asked: Asked, seed: int, overrides: Sequence[str], folder: Path) -> None:
    """Of each case write start, end-1, end-2 .. (safetensors), lines.json and fingerprint.json, in a folder of its own.
    overrides: of a variant.
    """
    for case in cases(asked, seed):
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
        (folder / _FINGERPRINT).write_text(json.dumps(run.fingerprint().as_json()))
    finally:
        run.close()
    (folder / "lines.json").write_text(json.dumps(lines))


def _copied(state: Any) -> dict[str, Any]:
    return {name: state.tensors[name].clone() for name in state.tensors}


if __name__ == "__main__":
    main()
