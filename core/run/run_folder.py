"""A run's folder: who may write in it, and which recipe it belongs to.

    runs/<name>/lock              held for the run's life: process, host, start, command, and the recipe that this start
                                  asks for
                recipe.json       the resolved recipe, canonical JSON: the truth
                recipe.yaml       the same for people
                recipe.<step>.json  an earlier recipe, replaced when the run was continued from <step>: with changes
                                    allowed by
                                    name, or by a version with more keys
                environment.json  where the run was last started
                ledger.jsonl      what happened, in a chain of hashes (core/run/ledger.py)
                metrics.jsonl  tensorboard/  tracking/  checkpoints/  branches/  analyses/

What a reader would get wrong: the lock is the kernel's (flock), not the file. The file is never removed, and what it
says counts only while some process holds the lock. This module imports no torch, so that a refusal is instant.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weftrain.core.config import Recipe
from weftrain.core.errors import RunFolderError, RunInUseError, file_problem, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.strict_yaml import dump_yaml

RECIPE = "recipe.json"
READABLE_RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
LOCK = "lock"

Difference = tuple[str, Any, Any]  # dotted key, old value, new value


class _Absent:
    """Stands for a value on the side of a difference that does not have the key."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


@dataclass(frozen=True)
class RecipeCheck:
    """The recipe that the run was made with, and how the one asked for differs; every change is allowed."""

    stored: Mapping[str, Any] | None  # None: the run is new
    changes: tuple[Difference, ...]


@dataclass(frozen=True)
class RunFolder:
    """An open run folder, whose lock this process holds. `recipe`: the resolved recipe that this start asks for."""

    path: Path
    recipe: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def check_writable(self) -> None:
        """Raises RunFolderError where a file or folder that training writes to may not be written."""
        appended = (
            self.path / name for name in ("ledger.jsonl", "metrics.jsonl", RECIPE, READABLE_RECIPE, ENVIRONMENT)
        )
        for path in (self.path, self.checkpoints, *appended):
            if path.exists() and not os.access(path, os.W_OK):
                raise RunFolderError(
                    f"{path}: may not be written by this user: check its permissions, or choose another folder"
                )

    def check_recipe(self, allow: Set[str], recorded: Mapping[str, Any] | None = None, step: int = 0) -> RecipeCheck:
        """Compare with the recipe that the folder was made for. Nothing is written: `record_recipe` does that.

        allow: dotted keys that may differ; each changed key must be named. recorded: the recipe in the checkpoint that
        is resumed from, which stands in for a lost recipe.json. step: completed steps there; what either recipe plans
        for it was allowed when it was planned. Raises RunFolderError listing every change and the flags that would
        allow the rest.
        """
        found = with_defaults(stored_recipe(self.path, missing_ok=True))
        stored = with_defaults(recorded) if found is None else found
        changes = [] if stored is None else differences(stored, self.recipe)
        asked = [] if stored is None else differences(recipe_at(stored, step), self.recipe)
        again = _planned_after(recorded, step, self.recipe)
        asked = [change for change in asked if not (follows(change[0]) or again(change[0]))]
        if any(key not in allow for key, _, _ in asked):
            listed = ", ".join(f"{key}: {shown(old)} -> {shown(new)}" for key, old, new in asked)
            flags = " ".join(f"--allow {key}" for key, _, _ in asked)
            raise RunFolderError(
                f"{self.path}: the recipe is not the one this run was made with ({listed}): "
                f"give it back its values, use another run name, or continue with the changes by adding {flags}"
            )
        return RecipeCheck(stored, tuple(changes))

    def record_recipe(self, check: RecipeCheck, step: int = 0) -> None:
        """Record this recipe, and the one it replaces as recipe.<step>.json. step: where the run continues."""
        with folder_errors(self.path):
            fsops.make_dirs(self.checkpoints)
            written = stored_recipe(self.path, missing_ok=True)
            if written is not None and canonical_json(written) == canonical_json(self.recipe):
                return
            earlier = written or (check.stored if check.changes else None)
            if earlier is not None:  # as it was written: an earlier version has fewer keys
                fsops.write_bytes(self._unused_name(step), canonical_json(earlier) + b"\n")
            # The truth last: a crash in between leaves a view that the next start writes again.
            fsops.write_bytes(self.path / READABLE_RECIPE, dump_yaml(self.recipe).encode())
            fsops.write_bytes(self.path / RECIPE, canonical_json(self.recipe) + b"\n")

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Record where the run is being started, as JSON values. A checkpoint's manifest has that of its own start."""
        with folder_errors(self.path):
            fsops.write_bytes(self.path / ENVIRONMENT, canonical_json(environment) + b"\n")

    def _unused_name(self, step: int) -> Path:
        path, number = self.path / f"recipe.{step}.json", 1
        while path.exists():
            number += 1
            path = self.path / f"recipe.{step}-{number}.json"
        return path


def planned(key: str) -> bool:
    """Whether a recipe's key is of its plan of changes: a start that makes one drops it from there."""
    return key.split(".")[0] == "changes"


def recipe_at(recipe: Mapping[str, Any], step: int) -> Mapping[str, Any]:
    """A recorded recipe with the changes that it plans up to `step` completed steps."""
    if not recipe.get("changes"):
        return recipe
    try:
        return Recipe.from_record(recipe).at(step).model_dump(mode="json")
    except ValidationError:
        return recipe


def _planned_after(recorded: Mapping[str, Any] | None, step: int, asked: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a key has its value again that the checkpoint's recipe gives it before a change that it plans: of a run
    that went back to before that change.
    """
    if recorded is None or not recorded.get("changes"):
        return lambda key: False
    there = recipe_at(with_defaults(recorded) or {}, step)
    later = ["changes", *(key for change in there.get("changes", ()) for key in change["set"])]
    other = [key for key, _, _ in differences(there, asked)]
    return lambda key: (
        any(_within(key, one) for one in later) and not any(_within(key, one) or _within(one, key) for one in other)
    )


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def follows(key: str) -> bool:
    """Whether a recipe's key follows from others and the checkpoint (core/run/continuation.py): it needs no --allow."""
    return key.split(".")[:2] == ["data", "continues"]


def stored_recipe(folder: Path, *, missing_ok: bool = False) -> dict[str, Any] | None:
    """The resolved recipe that a run's folder was made for, as it was written. None where there is none and
    `missing_ok`.

    Raises RunFolderError.
    """
    path = folder / RECIPE
    try:
        stored = parse_json(read_plain(path, "record"))
        if not isinstance(stored, dict):
            raise ValueError("is not a recipe")
    except FileNotFoundError as error:
        if missing_ok:
            return None
        raise RunFolderError(f"{path}: is missing: name the folder of a run that was started") from error
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be read: {file_problem(error)}: check the disk and its permissions"
        ) from error
    except ValueError as error:
        raise RunFolderError(
            f"{path}: damaged: {error}: restore it from the newest checkpoint's manifest, key 'recipe'"
        ) from error
    return stored


def with_defaults(recipe: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A recipe that an earlier version recorded, with the keys that came since: their defaults are what it did."""
    try:
        return recipe if recipe is None else Recipe.from_record(recipe).model_dump(mode="json")
    except ValidationError:
        return recipe  # the comparison then names what differs


@contextlib.contextmanager
def held_run(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder that is there, for a command that changes it.

    Raises RunFolderError where the run is in use, or the folder is no run's: then nothing is made in it.
    """
    if not (folder / RECIPE).exists():
        raise RunFolderError(f"{folder / RECIPE}: is missing: name the folder of a run that was started")
    with contextlib.ExitStack() as stack:
        with folder_errors(folder):
            _take_lock(stack, folder)
        yield


@contextlib.contextmanager
def open_run(folder: Path, recipe: dict[str, Any]) -> Iterator[RunFolder]:
    """Make or open a run's folder and hold its lock until the block ends. Temporary files of dead processes are
    removed.

    A folder that was made for this start is removed again where the start is refused: the block fails before
    `record_recipe`. recipe: the resolved recipe, JSON values. Raises RunFolderError, before anything else is done,
    where the folder is in use, read-only, on a full disk or not a folder.
    """
    folder = Path(folder)
    made = fsops.missing_folders(folder)
    with contextlib.ExitStack() as stack:
        with folder_errors(folder):
            fsops.make_dirs(folder)
            _take_lock(stack, folder, recipe=recipe)
            run = RunFolder(folder, parse_json(canonical_json(recipe)))  # as it will read back: tuples become lists
            fsops.remove_leftovers(folder)
            fsops.remove_leftovers(run.checkpoints)
        try:
            yield run
        except (Exception, KeyboardInterrupt):
            if made and not (folder / RECIPE).exists():
                with contextlib.suppress(OSError):  # the error that led here is the one to report
                    fsops.remove_tree(folder)
                fsops.remove_empty(made[1:])
            raise


def asked_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe that the newest start of the run in `folder` asked for, which recipe.json has only once training
    began.

    For processes that join the run while it starts. None where no run was started there.
    """
    try:
        recipe = parse_json(read_plain(folder / LOCK, "record"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # there is no lock yet, it is being written, or a command that trains nothing holds it
    return recipe if isinstance(recipe, dict) else None


def _take_lock(stack: contextlib.ExitStack, folder: Path, **more: Any) -> None:
    try:
        stack.enter_context(fsops.held_lock(folder / LOCK, canonical_json(_this_process() | more) + b"\n"))
    except BlockingIOError as error:
        raise RunInUseError(
            f"run folder {folder} is in use by {_holder(folder / LOCK)}: wait for it, stop it, or choose another run "
            "name"
        ) from error


def differences(old: Any, new: Any) -> list[Difference]:
    """Every leaf in which two resolved recipes differ, as (dotted key, old, new) in key order; list items count as keys
    0, 1, ..

    A key on one side only has ABSENT on the other. 1 and 1.0 are the same number; true and 1 are not the same value.
    """
    return list(_differences("", old, new))


def _differences(key: str, old: Any, new: Any) -> Iterator[Difference]:
    pairs: list[tuple[str, Any, Any]]
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(name, old.get(name, ABSENT), new.get(name, ABSENT)) for name in sorted(old.keys() | new.keys())]
    elif isinstance(old, list) and isinstance(new, list):
        longest = range(max(len(old), len(new)))
        pairs = [(str(i), old[i] if i < len(old) else ABSENT, new[i] if i < len(new) else ABSENT) for i in longest]
    else:
        if isinstance(old, bool) is not isinstance(new, bool) or old != new:
            yield key, old, new
        return
    for name, old_item, new_item in pairs:
        yield from _differences(f"{key}.{name}" if key else name, old_item, new_item)


def shown(value: Any) -> str:
    return repr(value) if value is ABSENT else canonical_json(value).decode()


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def _holder(lock: Path) -> str:
    try:
        holder = parse_json(read_plain(lock, "record"))
        return f"process {holder['pid']} on {holder['host']} since {holder['started']} ({holder['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it holds the lock and has not written its name yet


def folder_errors(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Raise a failing file operation of the block as a RunFolderError that names the folder."""
    remedy = "make room, check its permissions, or choose another folder"
    return os_errors_as(RunFolderError, f"run folder {folder} cannot be used", remedy)
