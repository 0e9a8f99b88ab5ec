"""Going back to an earlier checkpoint, and putting a chunk off: what one does after a loss spike, as commands and lines
of the ledger.

Nothing is deleted. What lies beyond the step becomes a branch: its checkpoints move to `branches/<number>/`, its
measurements stay in metrics.jsonl, and the ledger keeps every root. The line in the ledger comes first and the
checkpoints move after it, so a crash in between is finished by whoever opens the run next (`finish_rollback`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from weftrain.core import checkpoint
from weftrain.core.backend import StoredState
from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError, RunFolderError
from weftrain.core.formats import fsops
from weftrain.core.formats.checkpoint_manifest import STEP_FOLDER, folder_name, read_checkpoint_manifest
from weftrain.core.formats.safe_names import path_below
from weftrain.core.order.timeline import chunk_order
from weftrain.core.run.alert_actions import WayBack
from weftrain.core.run.ledger import BRANCHES, Ledger
from weftrain.core.run.lineage import Branch, going_back, lineage
from weftrain.core.run.retention import removed_roots
from weftrain.core.run.stored_state import completed


def rollback(
    run: Path, ledger: Ledger, step: int, reason: str, kept: StoredState | None = None, reached: int = 0
) -> Branch:
    """Make the checkpoint of `step` the one that the run in `run` goes on from. The run's lock must be held.

    reached: completed steps of a process that ended unsaved to go back. kept: state that the run's backend keeps by
    itself, which may be beyond the newest checkpoint. It stays where it is: by the ledger's new line the run does not
    go on from it (core/run/stored_state.py). Every byte of that checkpoint is verified first. Raises CheckpointError or
    RunFolderError, nothing changed.
    """
    finish_rollback(run, ledger)  # or what an earlier one left half done would be counted to this one
    folder = run / "checkpoints"
    found = _steps(folder)
    if step not in found:
        have = ", ".join(str(number) for number in sorted(found)) or "none"
        gone = step in removed_roots(ledger.entries).values()
        why = f"the checkpoint of step {step} was removed" if gone else f"there is no checkpoint of step {step}"
        raise CheckpointError(f"{folder}: {why}; there are: {have}")
    later = sorted(number for number in found if number > step)
    if not later and max(reached, completed(kept, ledger.entries)) <= step:
        raise RunFolderError(f"{run}: step {step} is the newest checkpoint already: there is nothing to go back from")
    manifest = checkpoint.verify(found[step])
    points = {point.root: point for point in lineage(ledger.entries).checkpoints}
    if ledger.entries and manifest["root"] not in points:
        raise CheckpointError(
            f"{found[step]}: its root {manifest['root'][:12]} is not on the line of {run}/ledger.jsonl: is it another "
            "run's?"
        )
    roots = [[number, _root(found[number])] for number in later]
    number = 1 + max((branch.number for branch in lineage(ledger.entries).branches), default=0)
    ledger.add("rollback", step=step, root=manifest["root"], branch=number, abandoned=roots, reason=reason)
    finish_rollback(run, ledger)
    return lineage(ledger.entries).branches[-1]


def take_back(
    run: Path, ledger: Ledger, recipe: Recipe, way: WayBack, reached: int, kept: StoredState | None = None
) -> None:
    """Do what an alert asked for: go back, and defer the chunk. A crash in between leaves a run that goes on from the
    checkpoint, and alerts again. The run's lock must be held. Raises CheckpointError or RunFolderError.
    """
    rollback(run, ledger, way.to_step, way.reason, kept, reached)
    if way.chunk is not None:
        defer_chunk(run, ledger, recipe, way.chunk, "defer", way.reason, kept)


def abandoned(run: Path, entries: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Checkpoints that the last rollback left and that a crash kept from moving to their branch."""
    last = _last_rollback(entries)
    if last is None:
        return []
    paths = [(run / "checkpoints" / folder_name(step), root) for step, root in last["abandoned"]]
    return [path for path, root in paths if path.exists() and _root(path) == root]


def finish_rollback(run: Path, ledger: Ledger) -> list[Path]:
    """Move to its branch whatever checkpoint the last rollback left and a crash did not let it move. What was moved."""
    moved, last = [], _last_rollback(ledger.entries)
    for path in abandoned(run, ledger.entries):
        assert last is not None
        target = path_below(run / BRANCHES, str(last["branch"]))
        fsops.make_dirs(target)
        fsops.rename(path, target / path.name)
        moved.append(target / path.name)
    return moved


def _last_rollback(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The rollback that ends the ledger's line; None if the run has gone on since."""
    relevant = [entry for entry in entries if entry["kind"] in ("rollback", "resume", "start")]
    return relevant[-1] if relevant and relevant[-1]["kind"] == "rollback" else None


def defer_chunk(
    run: Path,
    ledger: Ledger,
    recipe: Recipe,
    chunk: int,
    action: Literal["defer", "drop"],
    reason: str,
    kept: StoredState | None = None,
) -> Mapping[str, Any]:
    """Enter that `chunk` comes after all others, or never; `ledger.with_decisions` lays it over the recipe. The new
    line.

    kept: state that the run's backend keeps by itself.
    The run's lock must be held. Raises RunFolderError where it cannot be any more.
    """
    finish_rollback(run, ledger)
    if recipe.data.chunks is None:
        raise RunFolderError(
            "the run's data is not cut in chunks: set data.chunks when a run begins, or skip rows with data.skip"
        )
    if not 0 <= chunk < recipe.data.chunks:
        raise RunFolderError(f"there is no chunk {chunk}: the run has {recipe.data.chunks}, counted from 0")
    order = chunk_order(recipe.data, recipe.schedule.steps, recipe.batch.global_batch_size)
    if any(entry.chunk == chunk for entry in recipe.data.skip) or any(
        entry["chunk"] == chunk for entry in lineage(ledger.entries).decisions
    ):
        raise RunFolderError(f"chunk {chunk} is deferred or dropped already: see data.skip, or `weftrain log`")
    first = order.order.index(chunk) * (recipe.schedule.steps // recipe.data.chunks)
    newest = max(_steps(run / "checkpoints"), default=0)
    reached = max(newest, completed(kept, ledger.entries))
    if first < reached:
        what = "newest checkpoint" if reached == newest else "backend's own state"
        raise RunFolderError(
            f"chunk {chunk} begins at step {first} and the {what} is of step {reached}: {going_back(first, str(run))}"
        )
    return ledger.add("defer", step=reached, chunk=chunk, action=action, reason=reason)


def _steps(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {int(match[1]): path for path in folder.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))}


def _root(path: Path) -> str:
    try:
        return str(read_checkpoint_manifest(path)["root"])
    except (OSError, ValueError):
        return "damaged"  # it is moved all the same: a damaged checkpoint is evidence too
