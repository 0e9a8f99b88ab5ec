"""Which checkpoints a rule keeps, and the disk that a run's checkpoints take, without reading any: for `show`, which
imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weftrain.core.config import KeepConfig, Recipe
from weftrain.core.formats import fsops
from weftrain.core.formats.units import gb
from weftrain.core.parameters import parameter_count

ARCHIVE = "archive"  # folder of a run: the weights of removed checkpoints, each a checkpoint without optimizer tensors
WEIGHTS_BYTES, STATE_BYTES = 4, 12  # of a parameter: fp32 weights, and those with AdamW's two moments


@dataclass(frozen=True)
class DiskNeed:
    """What a run's checkpoints take at the end, counted with moments of 4 bytes; a backend may store narrower ones."""

    checkpoints: int
    each_bytes: int
    archives: int
    archive_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.checkpoints * self.each_bytes + self.archives * self.archive_bytes


def disk_need(recipe: Recipe) -> DiskNeed:
    """The checkpoints that a whole run leaves; while one is written there is one more than the rule keeps."""
    steps, parameters = saved_steps(recipe), parameter_count(recipe.model)
    keep, kept, archives = recipe.checkpoint.keep, len(steps), 0
    if keep is not None:
        kept = min(len(steps), len(reasons(steps, keep, chunk_steps_of(recipe), {})) + keep.best + 1)
        archives = len(steps) - kept if keep.archive == "weights" else 0
    return DiskNeed(kept, STATE_BYTES * parameters, archives, WEIGHTS_BYTES * parameters)


def disk_warning(recipe: Recipe, run: Path) -> str:
    """A line for the user where the checkpoints that the run in `run` still writes take more disk than is free; else
    "". Raises OSError.
    """
    folders = (run / "checkpoints", run / ARCHIVE)
    there = sum(path.stat().st_size for folder in folders for path in folder.glob("step_*/*"))
    need, free = max(0, disk_need(recipe).total_bytes - there), fsops.free_bytes(run)
    if need <= free:
        return ""
    return (
        f"the run's checkpoints take up to {gb(need)} more, and {gb(free)} are free below {run}: make room, set "
        "checkpoint.keep to remove old ones, or save less often with checkpoint.every_steps"
    )


def saved_steps(recipe: Recipe) -> list[int]:
    """Completed steps at which a run of this recipe saves its state, ascending."""
    last, found = recipe.schedule.steps, set[int]()
    for interval in (recipe.checkpoint.every_steps, chunk_steps_of(recipe)):
        if interval:
            found.update(range(interval, last + 1, interval))
    changes = {change.step for change in recipe.changes}
    return sorted(found | changes | ({last} if recipe.checkpoint.at_end else set()))


def chunk_steps_of(recipe: Recipe) -> int | None:
    """Steps of each chunk of the data; None where it has none."""
    return None if recipe.data.chunks is None else recipe.schedule.steps // recipe.data.chunks


def reasons(
    steps: Sequence[int], keep: KeepConfig, chunk_steps: int | None, losses: Mapping[int, float]
) -> dict[int, str]:
    """Why each of the checkpoints of `steps`, ascending, is kept; a step that the rule does not keep is left out.

    chunk_steps: of a run whose data is cut in chunks. losses: held-out losses by step; where two are equal, the earlier
    checkpoint is the better one, and one without a number is worse than any.
    """
    found = dict.fromkeys(steps[-1:], "the newest")
    found |= {step: f"among the last {keep.last}" for step in steps[-keep.last :] if step not in found}
    if keep.every_steps is not None:
        of = keep.every_steps
        found |= {step: f"a multiple of {of}" for step in steps if step % of == 0 and step not in found}
    if keep.chunk_ends and chunk_steps is not None:
        found |= {step: "at the end of a chunk" for step in steps if step % chunk_steps == 0 and step not in found}
    measured = [step for step in steps if losses.get(step, float("nan")) == losses.get(step)]
    best = sorted(measured, key=lambda step: (losses[step], step))[: keep.best]
    found |= {step: f"held-out loss {losses[step]:.4f}" for step in best if step not in found}
    return found
