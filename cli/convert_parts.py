"""What the verbs of `weftrain convert` share: reading a checkpoint, the folder of a new one, and the bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weftrain.cli.display import Bar, Console

if TYPE_CHECKING:
    from weftrain.core.backend import State
    from weftrain.core.checkpoint import CheckpointInfo
    from weftrain.core.config import Recipe
    from weftrain.core.formats.lazy_tensors import Progress


new_run = click.option(
    "--run",
    "run_name",
    required=True,
    help="Name of the run that the checkpoint is to be of; start_from names it then.",
)


def progress_bar(path: Path) -> Bar:
    return Bar(Console(stderr=True), f"convert {path.name}", 1)


def shown(bar: Bar, words: str) -> Progress:
    """Shows bytes on the bar, with what is done with them."""
    return lambda done, total: bar.update(done, words, None, total, sizes=True)


def hashed(bar: Bar, total: int) -> Callable[[int], None]:
    """Shows how much of `total` bytes of files has been hashed, given the bytes of one block after another."""
    show, done = shown(bar, "hashed"), 0

    def add(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        show(done, total)

    return add


def load_recorded(checkpoint: Path, bar: Bar) -> tuple[Recipe, State, dict[str, Any]]:
    """The recipe, state and manifest of a run's newest whole checkpoint, or of the one named; the bar shows how much is
    verified. Raises CheckpointError, RecipeError.
    """
    from weftrain.cli.assembly import newest_or_named, recipe_of_checkpoint
    from weftrain.core import checkpoint as checkpoints

    verifying = shown(bar, "verified")
    path = newest_or_named(checkpoint, bar.say, verifying)
    state, manifest = checkpoints.load(path, verified=path != checkpoint, progress=verifying)
    return recipe_of_checkpoint(path, manifest).recipe, state, manifest


@contextlib.contextmanager
def new_checkpoints(runs: Path, run_name: str) -> Iterator[Path]:
    """The `checkpoints` folder of a new run; if the block raises, no empty folder is left. Raises
    CheckpointError.
    """
    from weftrain.core.errors import CheckpointError
    from weftrain.core.formats import fsops

    folder = runs / run_name / "checkpoints"
    if folder.exists():
        raise CheckpointError(f"{folder}: there are checkpoints already: name another --run")
    missing = fsops.missing_folders(folder)
    fsops.make_dirs(runs)
    try:
        yield folder
    except BaseException:
        fsops.remove_empty(missing)
        raise


def save_imported(
    target: Path, state: State, recipe: Recipe, sha256: str, fingerprint: dict[str, Any]
) -> CheckpointInfo:
    """A checkpoint of tensors that were trained elsewhere. sha256: of their files. fingerprint: names what they are of,
    `backend` and `imported_from` at least.
    """
    from weftrain.core import checkpoint as checkpoints

    return checkpoints.save(
        target,
        state,
        recipe=recipe.model_dump(mode="json"),
        dataset_id=f"unknown: imported from {sha256}",
        fingerprint=fingerprint,
        tokens=state.step * recipe.tokens_per_step,
        position=state.step * recipe.batch.global_batch_size,
        parent=None,
        kernels={},
    )


def say_imported(info: CheckpointInfo, run_name: str, step: str = "") -> None:
    """step: its number in words, where it is not 0."""
    next_step = f"start from it with start_from={{run: {run_name}, state: weights}}"
    click.echo(f"{info.path}: {step}{info.size_bytes:,} bytes; {next_step}")
