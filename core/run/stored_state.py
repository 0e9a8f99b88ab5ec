"""State that a backend keeps on disk by itself: whether a run goes on from it, and what its last step still lacks in
the record.

Such a state names the *segment* of training that completed its last step (`Job.segment`), and each `start` and `resume`
line of the ledger names the segment that it begins. So the ledger alone says whose a state is: the run goes on from it
only if it is of the ledger's last segment and no rollback came after. A state that a rollback or a resume from an
earlier checkpoint left behind is set aside under another name; one that the ledger does not know is another run's and
is refused. Nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weftrain.core.backend import Plan, StepResult, StoredState, StoredStateUse
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.dataset_manifest import SourceCursor
from weftrain.core.run.lineage import TrainingSegment, lineage

Whose = Literal["current", "behind", "left", "foreign"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a backend's own state. said: a line for the user, or empty. continues: the segment that the run
    goes on from.
    """

    use: StoredStateUse
    said: str = ""
    continues: str | None = None


@dataclass(frozen=True)
class Unfinished:
    """The last step that a backend's own state had completed, where its process ended before all that the plan wants of
    it was recorded.

    All is that of the segment which made it, also if the run goes on with another recipe or dataset. sources: how far
    each source had been read; empty where nothing tells.
    """

    result: StepResult
    recipe: Recipe
    plan: Plan
    dataset_id: str
    sources: Mapping[str, SourceCursor]


@dataclass(frozen=True)
class Measured:
    """Records (steps and evaluations) that came after the checkpoint of `after` steps, up to where a backend's own
    state stands.
    """

    after: int
    records: Sequence[Mapping[str, Any]]


def whose(stored: StoredState, entries: Sequence[Mapping[str, Any]]) -> Whose:
    """current: of the ledger's last segment. behind: of an earlier one of the run's line. left: of training that the
    run has left.
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
    """The segment that completed the last step of a `current` state; a later one may have begun, and ended before its
    first step.
    """
    segments = lineage(entries).segments
    return next(segment for segment in reversed(segments) if entries[segment.entry].get("stretch") == stored.segment)


def completed(stored: StoredState | None, entries: Sequence[Mapping[str, Any]]) -> int:
    """Steps that the backend's own state has completed on the run's line; 0 where there is none on it."""
    return stored.step if stored is not None and entries and whose(stored, entries) == "current" else 0


def judge(stored: StoredState | None, entries: Sequence[Mapping[str, Any]], first: int, backend: str) -> Verdict:
    """What a start that could resume from a checkpoint of `first` steps (0: there is none) does with the backend's own
    state.

    Raises BackendError for another run's.
    """
    if stored is None:
        return Verdict("replace")
    standing = f"the {backend} backend's own state in {stored.where} stands at {stored.step} completed steps"
    owner = whose(stored, entries)
    if owner == "foreign":
        raise BackendError(
            f"{standing} and belongs to a run with another ledger: move it away, or choose another folder for this "
            "run's in backend.options"
        )
    if owner == "current" and stored.step >= first:
        return Verdict("continue", f"{standing}: the run goes on from there", stored.segment)
    if owner in ("current", "behind") and stored.step <= first:
        return Verdict(
            "replace", f"{standing}, and the newest checkpoint at {first}: it is made again from the checkpoint"
        )
    return Verdict(
        "set_aside",
        f"{standing} and belongs to training that the run has left ({_left(entries)}): it is renamed to "
        f"{stored.where.name}.superseded-N and "
        f"not used any more; the run goes on from step {first}",
    )


def _left(entries: Sequence[Mapping[str, Any]]) -> str:
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
    """Whether the record lacks anything that the plan wants of the last step of a state that the run goes on from.

    The process may have been killed after the state had completed the step and before its log line, evaluation or
    checkpoint was durable. checkpoint_step: of the newest checkpoint. records: as `metrics.read_metrics` gives them.
    heldout: names of the held-out sets.
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
