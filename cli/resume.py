"""`weftrain resume`: continue a release as a new run, from its last state or that of any revision.

The new run counts its steps on from there, with the release's recipe, schedule and data, so without other changes it
makes the bits that the release's own run would have made. Its ledger names the release, and it is trained further by
`weftrain train runs/NAME/recipe.yaml --run NAME`, as any run of a recipe's file.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weftrain.cli import arguments, remote
from weftrain.cli.display import Console, program
from weftrain.cli.train_command import TrainCommand
from weftrain.core.errors import RecipeError, ReleaseError, RunFolderError
from weftrain.core.formats.safe_names import checked_segment

if TYPE_CHECKING:
    from weftrain.core.recipe_file import RecipeFile


class _Place(remote.RunPath):
    """A release's folder or address, as it was named and as the local folder that it is opened as."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return str(value), super().convert(value, param, ctx)


@click.command("resume")
@click.argument("release", type=_Place(exists=True, file_okay=False))
@arguments.overrides
@click.option("--as", "name", required=True, metavar="RUN", help="Name of the new run's folder.")
@click.option("--revision", metavar="CKPT", help="The revision to go on from, such as ckpt_003.  [default: the last]")
@remote.runs_options
@click.option("--backend", help="Another backend than the release's.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="From a signal to the end of the process, at most: a save that took longer before is not begun then.",
)
def resume(
    release: tuple[str, Path],
    overrides: tuple[str, ...],
    name: str,
    revision: str | None,
    runs: Path | str,
    staging: Path | None,
    keep: int,
    backend: str | None,
    grace: float | None,
) -> None:
    """Continue RELEASE as the new run RUN: its weights, optimizer state, data order and schedule go on where they were.

    KEY.SUB=VALUE overrides a value of the release's recipe, e.g. schedule.steps=480. The data are the release's own,
    unless data.root says otherwise. The new run's ledger names the release, revision and link that it began from.
    """
    from weftrain.cli.train import train_run

    place = remote.RunsPlace(runs, staging, keep)
    try:
        checked_segment(name)
    except ValueError as error:
        raise click.BadParameter(
            f"{error}; a run name is one word, and --runs names the folder", param_hint="--as"
        ) from error
    folder = place.runs / name
    file = _recipe(*release, name, revision, overrides, backend)
    again = TrainCommand(str(folder / "recipe.yaml"), (), None, place.runs, name, place.options, file)
    train_run(again, place, set(), grace, check=lambda: _check_new(folder, again))


def _check_new(folder: Path, again: TrainCommand) -> None:
    """Raises RunFolderError for a run that is there already."""
    from weftrain.core.run.run_folder import RECIPE

    if (folder / RECIPE).exists():
        words = shlex.join([program(), "train", again.recipe, "--run", folder.name, *again.place])
        raise RunFolderError(
            f"{folder}: is there already: name a new run with --as, or train that one on with `{words}`"
        )


def _recipe(
    named: str, folder: Path, name: str, revision: str | None, overrides: tuple[str, ...], backend: str | None
) -> RecipeFile:
    """The recipe by which the revision was trained, which starts from it and counts its steps on.

    Of backend.options only portable ones are taken: a release chooses no path and no device here. Raises ReleaseError,
    RecipeError, BackendError.
    """
    from weftrain.cli.resolve import resolve_foreign
    from weftrain.core.formats.checkpoint_manifest import folder_name, read_checkpoint_manifest
    from weftrain.exchange.release.ancestry import named_revision, parent_release
    from weftrain.exchange.release.release import read_release
    from weftrain.exchange.remote.store import is_address

    release = read_release(folder)
    parent = parent_release(folder, release, named_revision(folder, release, revision))
    checkpoint = folder / "checkpoints" / folder_name(parent.step)
    try:
        tree = dict(read_checkpoint_manifest(checkpoint)["recipe"])
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{checkpoint}: manifest.json: {error}: fetch the release again, and verify it") from error
    place = named if is_address(named) else str(folder.absolute())
    start = {"folder": place, "revision": parent.revision, "state": "all", "data": "continue", "steps": "continue"}
    data = dict(tree["data"]) | {"continues": None}
    if release.data == "shards" and not is_address(named):
        data["root"] = str(folder.absolute() / "data")
    elif release.data != "none" and not any(one.startswith("data.root=") for one in overrides):
        why = "is not on this machine" if release.data == "shards" else "holds only hashes of its data"
        raise RecipeError(f"{named}: {why}: name the folder of its datasets with data.root=FOLDER")
    tree |= {"name": name, "start_from": start, "data": data}
    return resolve_foreign(tree, f"{named}: its recipe", overrides, backend, Console().print)
