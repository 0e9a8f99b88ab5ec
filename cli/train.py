"""`weftrain train`: put a run together, train it, and end with a summary.

What a reader would get wrong: the same command starts a run, continues an interrupted one, and says so where it is
complete; `weftrain resume` (cli/resume.py) begins a new run from a release, by the same steps. A signal finishes the
step, saves, and exits with 128 + its number.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weftrain.cli import remote
from weftrain.cli.display import Console, follows
from weftrain.cli.train_command import TrainCommand
from weftrain.cli.train_start import Command, train_on
from weftrain.cli.train_words import describe, say_kept
from weftrain.core.config import Recipe
from weftrain.core.formats.safe_names import checked_segment
from weftrain.core.recipe_file import RecipeFile, recorded_recipe
from weftrain.core.stop import StopRequest

if TYPE_CHECKING:
    from weftrain.core.backend import Follower
    from weftrain.core.formats.strict_model import StrictModel


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@remote.runs_options
@click.option("--run", "run_name", help="Name of the run folder.  [default: the recipe's name]")
@click.option("--backend", help="Another backend than the recipe's (`weftrain backends` lists them).")
@click.option(
    "--allow", multiple=True, metavar="KEY", help="Resume although this key of the recipe has changed (repeatable)."
)
@click.option(
    "--from-scratch",
    is_flag=True,
    help="Begin at step 0 again if all of the run's checkpoints are damaged or missing; the ledger records it.",
)
@click.option(
    "--repair-ledger",
    is_flag=True,
    help="Continue although the ledger lacks some checkpoints or is missing; the ledger records it.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="From a signal to the end of the process, at most: a save that took longer before is not begun then.",
)
def train(
    recipe: str,
    overrides: tuple[str, ...],
    runs: Path | str,
    staging: Path | None,
    keep: int,
    run_name: str | None,
    backend: str | None,
    allow: tuple[str, ...],
    grace: float | None,
    **asked: bool,
) -> None:
    """Train RECIPE, a built-in name or the path of a .yaml file; again: resume it, or say that it is complete.

    KEY.SUB=VALUE overrides a recipe value, e.g. schedule.steps=100. A run of a built-in recipe continues with the
    recipe it was made with, and overrides apply to that. SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 finish the step, save, and
    exit with 128 + the signal's number. SIGUSR2, or a file `save-now` in the run's folder, saves and goes on.
    """
    place = remote.RunsPlace(runs, staging, keep)
    again = TrainCommand(recipe, overrides, backend, place.runs, run_name, place.options)
    train_run(again, place, set(allow), grace, check=lambda: None, **asked)


def train_run(
    again: TrainCommand,
    place: remote.RunsPlace,
    allow: set[str],
    grace: float | None,
    *,
    check: Callable[[], None],
    **asked: bool,
) -> None:
    """Train the run that a command names, from wherever it stands. check: is called before anything is made, once the
    run's folder would be there. asked: flags of `core.resume.decide`.
    """
    from weftrain.cli.resolve import backend_options

    console, name = Console(), again.name()
    try:
        checked_segment(name)
    except ValueError as error:
        raise click.BadParameter(
            f"{error}; a run name is one word, and --runs names the folder", param_hint="--run"
        ) from error
    place.open(name, leads=not follows(), say=console.print)
    check()
    runs, file = place.runs, again.asked()
    kept = again.over_stored(runs / name, again.overrides)
    if not follows():  # at once: what comes next imports torch, which takes seconds
        if kept is not None:
            say_kept(console, again.recipe, runs / name, file.recipe, kept.recipe)
        describe(console, (kept or file).recipe)
    file = kept or file
    from weftrain.core.backend import Follower

    with StopRequest() as stop:
        chosen, options = backend_options(file)
        if isinstance(chosen, Follower) and chosen.follows():
            _run_worker(chosen, options, file.recipe, runs / name, stop)
        else:
            _train(Command(console, place, stop, again, grace), file, name, allow, **asked)
    if stop.number:
        sys.exit(128 + stop.number)


def _run_worker(backend: Follower, options: StrictModel, recipe: Recipe, folder: Path, stop: StopRequest) -> None:
    """Take part, silently, in the run that another process started by the same command leads."""
    from weftrain.cli.assembly import open_data
    from weftrain.core.backend import Job, Plan

    job = Job(recipe, Plan(0, recipe.schedule.steps), options, folder=folder, stop=stop)
    backend.run_worker(lambda: job, lambda job: open_data(job.recipe)[0], 0)


def _train(command: Command, file: RecipeFile, name: str, allow: set[str], **asked: bool) -> None:
    """Train, start after start: a run goes on in the same command where its recipe plans a change, or an alert asks for
    a way back.
    """
    from weftrain.core.run.run_folder import open_run

    console, path = command.console, command.place.runs / name
    whole, decided = _with_decisions(console, file, path)
    with open_run(path, whole.recipe.model_dump(mode="json")) as folder, contextlib.closing(command):
        first = True
        while train_on(command, whole, folder, allow | decided, first, **asked):
            file = command.again.over_stored(folder.path, command.again.overrides) or file
            whole, decided = _with_decisions(console, file, folder.path)
            first, asked = False, dict.fromkeys(asked, False)


def _with_decisions(console: Console, file: RecipeFile, folder: Path) -> tuple[RecipeFile, set[str]]:
    """The recipe with the chunks that the run's ledger defers or drops, and the keys of data.skip that they add."""
    from weftrain.core.run.ledger import read_ledger
    from weftrain.core.run.ledger_schema import LEDGER
    from weftrain.core.run.lineage import lineage, with_decisions

    decisions = lineage(read_ledger(folder / LEDGER)).decisions
    own = len(file.recipe.data.skip)
    skip = with_decisions(file.recipe.data, decisions)
    if len(skip) == own:
        return file, set()
    for entry in skip[own:]:
        done = "deferred" if entry["action"] == "defer" else "dropped"
        console.print(f"chunk {entry['chunk']} is {done}, as the ledger says: {entry['reason']}")
    tree = file.recipe.model_dump(mode="json")
    tree["data"]["skip"] = skip
    keys = {f"data.skip.{number}" for number in range(own, len(skip))}
    return recorded_recipe(tree, f"{folder / LEDGER}: with the chunks it defers"), keys
