"""A call of `weftrain train` as data: the recipe that it means, and the commands that it prints for the next start."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftrain.cli.display import program
from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError, RunFolderError
from weftrain.core.recipe_file import RecipeFile, is_path

if TYPE_CHECKING:
    from weftrain.core.order.batch import BatchSource


@dataclass(frozen=True)
class TrainCommand:
    """How `train` was called: what it asks for, and what it means for a run that is there already.

    given: the recipe of a run that begins, where `recipe` is the file that it will be in (cli/resume.py).
    """

    recipe: str
    overrides: tuple[str, ...]
    backend: str | None
    runs: Path
    run_name: str | None
    place: tuple[str, ...]  # the options that name `runs`, or what it is the staging folder of
    given: RecipeFile | None = None

    def name(self) -> str:
        """The run's name. Raises RecipeError."""
        from weftrain.cli.resolve import resolve_recipe

        if self.run_name is not None:
            return self.run_name
        try:
            return resolve_recipe(self.recipe, self.overrides, self.backend).recipe.name
        except RecipeError:  # the stored run may be what allows the overrides
            return resolve_recipe(self.recipe).recipe.name

    def asked(self) -> RecipeFile:
        """The recipe with the overrides, or the stored run's where only that allows them. Raises RecipeError."""
        from weftrain.cli.resolve import resolve_recipe

        if self.given is not None:
            return self.given
        try:
            return resolve_recipe(self.recipe, self.overrides, self.backend)
        except RecipeError:
            if (kept := self.over_stored(self.runs / self.name(), self.overrides)) is None:
                raise
            return kept

    def over_stored(self, folder: Path, overrides: Sequence[str]) -> RecipeFile | None:
        """The recipe that the run in `folder` was made with, with `overrides`, if that is what a start continues.

        It is not for a file, which may have been edited on purpose, for a run of another recipe, nor for a record that
        this version cannot read: there `decide` compares, and refuses what --allow does not name. Raises RecipeError.
        """
        from weftrain.cli.resolve import resolve_recipe, resolve_recorded
        from weftrain.core.run.ledger import read_ledger
        from weftrain.core.run.ledger_schema import LEDGER
        from weftrain.core.run.lineage import lineage, planned_again
        from weftrain.core.run.run_folder import RECIPE, stored_recipe

        origin = str(folder / RECIPE)
        try:
            tree = None if is_path(self.recipe) else stored_recipe(folder, missing_ok=True)
            if tree is None or resolve_recipe(self.recipe).recipe.name != tree.get("name"):
                return None
            line = lineage(read_ledger(folder / LEDGER))
            decided = [_decision(entry) for entry in line.decisions]
            tree = planned_again(tree, line)
            tree = resolve_recorded(tree, origin).recipe.model_dump(mode="json")
        except (RecipeError, RunFolderError):
            return None
        # What the ledger and the checkpoint say is added again when the run starts; a chunk of which the recipe itself
        # says something else stays as it says.
        skip = [entry for entry in tree["data"]["skip"] if _decision(entry) not in decided]
        tree["data"] |= {"skip": skip, "continues": None}
        return resolve_recorded(tree, origin, overrides, self.backend)

    def to_continue(self, recipe: Recipe, source: BatchSource, folder: Path, done: int) -> str:
        """The checked command that trains a complete run twice as long, or what must be decided before that."""
        from weftrain.cli.resolve import resolve_recipe
        from weftrain.core.run.longer_run import longer_run

        found = longer_run(
            folder,
            recipe,
            source,
            done,
            self.overrides,
            lambda given: (self.over_stored(folder, given) or resolve_recipe(self.recipe, given, self.backend)).recipe,
        )
        if isinstance(found, str):
            return f"to continue: {found}"
        options = [
            *(() if self.backend is None else ("--backend", self.backend)),
            *self.place,
        ]
        options += () if self.run_name is None else ("--run", self.run_name)
        words = [self.recipe, *found.overrides, *options, *(word for key in found.allow for word in ("--allow", key))]
        return f"{this_program()} {shlex.join(map(str, words))}    (continue to step {found.steps:,})"


def _decision(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is done with which chunk and why, of an entry of data.skip or of the ledger."""
    return entry["chunk"], entry["action"], entry["reason"]


def this_program() -> str:
    """How `train` was called: alone, or in every process that torchrun started, on one node or on several."""
    ranks, each = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks == "1":
        return f"{program()} train"
    if ranks == each:
        return f"torchrun --standalone --nproc-per-node {each} -m weftrain.cli train"
    return "with the torchrun and its options that started this run, on every node: -m weftrain.cli train"
