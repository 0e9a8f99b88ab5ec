"""State that a backend stores on disk by itself: whose it is, and what its last step still lacks in the record.

Such a state names the *segment* of training that completed its last step (`Job.segment`), and each `start` and `resume`
line of the ledger names the segment that it begins. So the ledger alone says whose a state is (`owner_of`), and
core/resume.py decides what becomes of it. Nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weftrain.core.backend import Plan, StepResult, StoredState
from weftrain.core.config import Recipe
from weftrain.core.formats.dataset_manifest import SourceCursor
from weftrain.core.run.lineage import TrainingSegment, lineage

Owner = Literal["current", "behind", "left", "foreign"]


@dataclass(frozen=True)
class Unfinished:
    """The last step of a stored state, whose process ended before all that the plan wants of it was recorded.

    Recipe, plan and dataset are those of the segment that made it, also if the run goes on with others. sources: how
    far each source had been read; empty if nothing tells.
    """

    result: StepResult
    recipe: Recipe
    plan: Plan
    dataset_id: str
    sources: Mapping[str, SourceCursor]


@dataclass(frozen=True)
class Measured:
    """Records of steps and evaluations after the checkpoint of `after` steps, up to where a stored state stands."""

    after: int
    records: Sequence[Mapping[str, Any]]


def owner_of(stored: StoredState, entries: Sequence[Mapping[str, Any]]) -> Owner:
    """current: of the ledger's last segment, and no rollback came after. behind: of an earlier one of the run's line.
    left: of training that a rollback or a resume from an earlier checkpoint left. foreign: unknown to the ledger.
    """
    opened = [entry for entry in entries if entry["kind"] in ("start", "resume")]
    if not stored.segment or all(
        stored.segment not in (entry.get("stretch"), entry.get("continues")) for entry in opened
    ):
        return "foreign"
    last = opened[-1]
    rolled_back = any(entry["kind"] == "rollback" for entry in entries[last["n"] :])
    # A process that was killed before its first step was complete has named a new segment in the ledger alone.
    taken_over = last.get("continues") == stored.segment and last["step"] == stored.step
    if not rolled_back and (last.get("stretch") == stored.segment or taken_over):
        return "current"
    for segment in lineage(entries).segments:
        entry = entries[segment.entry]
        if (
            entry.get("stretch") == stored.segment
            and segment.stop_step is not None
            and stored.step <= segment.stop_step
        ):
            return "behind"
    return "left"


def made_by(stored: StoredState, entries: Sequence[Mapping[str, Any]]) -> TrainingSegment:
    """The segment that completed the last step of a `current` state; a later one may have begun without a step."""
    segments = lineage(entries).segments
    return next(segment for segment in reversed(segments) if entries[segment.entry].get("stretch") == stored.segment)


def completed(stored: StoredState | None, entries: Sequence[Mapping[str, Any]]) -> int:
    """Steps that a stored state has completed on the run's line; 0 if there is none on it."""
    return stored.step if stored is not None and entries and owner_of(stored, entries) == "current" else 0


def left_by(entries: Sequence[Mapping[str, Any]]) -> str:
    """What left behind the state that is `left`, in words."""
    last = [entry for entry in entries if entry["kind"] in ("rollback", "resume", "start")][-1]
    did = "a rollback went back to" if last["kind"] == "rollback" else "training went on without it from"
    return f"line {last['n'] + 1} of the ledger: {did} step {last['step']}"


def is_unfinished(
    stored: StoredState,
    plan: Plan,
    checkpoint_step: int | None,
    entries: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    heldout: Collection[str],
) -> bool:
    """Whether the record lacks anything that the plan wants of the last step of a stored state.

    The process may have been killed after the state had completed the step and before its log line, evaluation or
    checkpoint was durable. checkpoint_step: of the newest checkpoint. heldout: names of the held-out sets.
    """
    if stored.result is None or checkpoint_step == stored.step:  # a checkpoint comes last
        return False
    if plan.wants_state(stored.step) or (stored.result.skipped and not skip_is_entered(entries, stored.step)):
        return True
    made = {(record["kind"], record.get("set")) for record in records if record.get("step") == stored.step}
    wanted: set[tuple[str, str | None]] = (
        {("evaluation", name) for name in heldout} if plan.wants_evaluation(stored.step) else set()
    )
    if plan.wants_log(stored.step) or stored.result.skipped:
        wanted.add(("step", None))
    return not wanted <= made


def skip_is_entered(entries: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether the ledger's line says that the step which made `step` steps complete was skipped."""
    for entry in reversed(entries):
        if entry["kind"] == "rollback":
            return False
        if entry["kind"] == "skip" and entry["step"] == step:
            return True
    return False
