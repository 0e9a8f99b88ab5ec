"""Which checkpoints of a run are kept, and how the others are removed: `checkpoint.keep` of a recipe, and `weftrain
prune` for a run that has none.

The newest checkpoint is never removed, nor one that another run beside it began from, nor one of a branch. A removal
is a line of the ledger first; the folders go after it, so a crash in between is finished by whoever opens the run next
(`finish_removals`). What the ledger says of a removed checkpoint stays: its root, its parent, and the measurements up
to it. A release then has one link from one kept checkpoint to the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import KeepConfig, Recipe
from weftrain.core.errors import CheckpointError, RunFolderError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.checkpoint_manifest import (
    MANIFEST,
    folder_name,
    is_manifest_of,
    read_checkpoint_manifest,
)
from weftrain.core.formats.lazy_tensors import select
from weftrain.core.formats.plain_file import plain_lines
from weftrain.core.formats.tensor_file import tensor_bytes
from weftrain.core.run.first_model import saves_first_model
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import Lineage, lineage
from weftrain.core.run.metrics import effective_records
from weftrain.core.run.retention_rule import ARCHIVE, chunk_steps_of, reasons


@dataclass(frozen=True)
class Removal:
    """A checkpoint that the rule does not keep. frees_bytes: its size without what an archive of it takes."""

    step: int
    root: str
    path: Path
    size_bytes: int
    frees_bytes: int


@dataclass(frozen=True)
class Retention:
    """What a rule makes of a run. kept: step -> why, the first reason that applies."""

    kept: Mapping[int, str]
    removals: tuple[Removal, ...]


def heldout_losses(records: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Completed steps -> mean loss over the held-out sets, of the evaluations among lines of metrics.jsonl."""
    sets: dict[int, list[float]] = {}
    for record in records:
        if record["kind"] == "evaluation":
            sets.setdefault(record["step"], []).append(record["loss"])
    return {step: sum(losses) / len(losses) for step, losses in sets.items()}


def plan(run: Path, line: Lineage, keep: KeepConfig, recipe: Recipe, losses: Mapping[int, float]) -> Retention:
    """What the rule `keep` makes of the checkpoints on the run's line. Nothing is written.

    A folder that is not whole, or not the checkpoint that the ledger lists, is neither kept nor removed: it is
    evidence.
    """
    present: dict[int, str] = {}
    for point in line.checkpoints:
        if point.root not in line.removed and _is_there(run / "checkpoints" / folder_name(point.step), point.root):
            present[point.step] = point.root
    kept = reasons(sorted(present), keep, chunk_steps_of(recipe), losses)
    if 0 in present and saves_first_model(recipe):
        kept = {0: f"the model that objective {recipe.objective.name} reads"} | kept
    elsewhere = begun_from(run)
    kept |= {step: f"run '{elsewhere[root]}' began from it" for step, root in present.items() if root in elsewhere}
    removals = []
    for step, root in sorted(present.items()):
        path = run / "checkpoints" / folder_name(step)
        with contextlib.suppress(OSError, ValueError):
            if step not in kept:
                size, weights = _sizes(read_checkpoint_manifest(path))
                removals.append(Removal(step, root, path, size, size - (weights if keep.archive == "weights" else 0)))
    return Retention(kept, tuple(removals))


def _is_there(path: Path, root: str) -> bool:
    try:
        found = (path / MANIFEST).stat()
        return _has_root(path, root, found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError:
        return False


@lru_cache(maxsize=4096)
def _has_root(path: Path, root: str, *file: int) -> bool:
    """file: what tells that the manifest is the one that was read before: after each save the rule looks at every
    checkpoint that is kept. Raises OSError.
    """
    return is_manifest_of(path, root)


def _sizes(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """A checkpoint's bytes, and those of its weights."""
    weights = (entry for name, entry in manifest["tensors"].items() if name.startswith("weights/"))
    weights_bytes = sum(tensor_bytes(entry["dtype"], tuple(entry["shape"])) for entry in weights)
    return sum(entry["size"] for entry in manifest["files"].values()), weights_bytes


def begun_from(run: Path) -> dict[str, str]:
    """Root of a checkpoint -> name of a run beside `run` that began from it, by the first line of its ledger."""
    found: dict[str, str] = {}
    for ledger in sorted(run.parent.glob(f"*/{LEDGER}")):
        if ledger.parent.name == run.name:
            continue
        try:
            first = parse_json(next(iter(plain_lines(ledger, "ledger"))))
            parent = first["parent"]
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            continue  # no run that can be read began from anything
        if isinstance(parent, str):
            found[parent] = ledger.parent.name
    return found


def archive(run: Path, removal: Removal) -> str:
    """Write the weights of a checkpoint that is to be removed below `archive`, every byte read being verified. The root
    of that archive, whose parent is the checkpoint's. Raises CheckpointError: nothing was removed.
    """
    state, manifest = checkpoint.load(removal.path)
    weights = select(state.tensors, {name: name for name in state.tensors if name.startswith("weights/")})
    same = ("recipe", "dataset_id", "fingerprint", "kernels", "tokens", "position", "sources")
    claims = {key: manifest[key] for key in same if key in manifest}
    only = State(state.step, state.optimizer_updates, weights)
    return checkpoint.save(run / ARCHIVE, only, parent=removal.root, **claims).root


def remove(
    run: Path,
    ledger: Ledger,
    removals: Sequence[Removal],
    keep: KeepConfig,
    archived: Mapping[int, str],
    delete: Callable[[Path], object] = fsops.remove_tree,
) -> None:
    """Enter the removals in the ledger, then remove the folders. The run's lock must be held.

    archived: step -> root of the archive of its weights. delete: removes a folder that has lost its name already.
    """
    if removals:
        told = [[removal.step, removal.root, archived.get(removal.step)] for removal in removals]
        newest = lineage(ledger.entries).checkpoints[-1].step
        ledger.add("remove", step=newest, removed=told, rule=keep.model_dump(mode="json"))
        finish_removals(run, ledger, delete)


def finish_removals(run: Path, ledger: Ledger, delete: Callable[[Path], object] = fsops.remove_tree) -> list[Path]:
    """Remove what the ledger says is removed and a crash left. The folders that were there."""
    found = list(_still_there(run, ledger.entries))
    for path in found:
        aside = fsops.temporary_beside(path)  # a name under which it is removed whatever happens, and never loaded
        fsops.rename(path, aside)
        delete(aside)
    return found


def _still_there(run: Path, entries: Sequence[Mapping[str, Any]]) -> Iterator[Path]:
    there = checkpoint.step_folders(run / "checkpoints")
    for root, step in removed_roots(entries).items():
        if (path := there.get(step)) is not None and path.is_dir():
            try:
                manifest = read_checkpoint_manifest(path)
            except (OSError, ValueError):
                continue
            if manifest["root"] == root:
                yield path


def removed_roots(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Root -> step of every checkpoint that was removed and not made again since."""
    found: dict[str, int] = {}
    for entry in entries:
        if entry["kind"] == "remove":
            found |= {root: step for step, root, _ in entry["removed"]}
        elif entry["kind"] == "checkpoint":
            found.pop(entry["root"], None)
    return found


def prune(
    run: Path,
    ledger: Ledger,
    keep: KeepConfig,
    recipe: Recipe,
    confirm: Callable[[Retention], bool] = lambda retention: True,
    progress: Callable[[Removal], None] = lambda removal: None,
) -> Retention:
    """Remove now what `keep` does not keep of the run in `run`, whose lock must be held.

    confirm: is shown what would go; nothing is written where it answers False. Raises CheckpointError, RunFolderError.
    """
    line = lineage(ledger.entries)
    if not line.checkpoints:
        raise RunFolderError(f"{run}: its ledger lists no checkpoint: there is nothing to remove")
    newest = line.checkpoints[-1]
    path = run / "checkpoints" / folder_name(newest.step)
    losses = heldout_losses(effective_records(run, kinds=("evaluation",))) if keep.best else {}
    found = plan(run, line, keep, recipe, losses)
    if found.removals and confirm(found):
        if checkpoint.verify(path)["root"] != newest.root:  # what would be left to go on from must be whole
            raise CheckpointError(
                f"{path}: is not the checkpoint {newest.root[:12]} of the ledger: nothing was removed"
            )
        archived = {}
        for removal in found.removals:
            progress(removal)
            if keep.archive == "weights":
                archived[removal.step] = archive(run, removal)
        remove(run, ledger, found.removals, keep, archived)
    return found
