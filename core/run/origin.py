"""What a start goes on from: `find_origin` decides it from the facts that core/run/situation.py finds, and from nothing
else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from weftrain.core.backend import StoredStateUse
from weftrain.core.run.situation import Situation, StoredFacts


class OriginKind(Enum):
    """What a start goes on from."""

    FRESH = "weights drawn from the seed"
    START_FROM = "another run's checkpoint"
    CHECKPOINT = "the run's own newest checkpoint"
    STORED_STATE = "the state that the backend itself stores"
    COMPLETE = "nothing: every step is trained and recorded"
    REFUSED = "nothing: `reason` says why, and what to do"


@dataclass(frozen=True)
class Origin:
    """step: completed steps to go on after; of START_FROM 0, unless start_from counts on from its checkpoint's.

    said: a line for the user about the backend's stored state, or "". reason: of a refusal."""

    kind: OriginKind
    step: int = 0
    stored_state: StoredStateUse = "replace"
    said: str = ""
    reason: str = ""


def find_origin(found: Situation) -> Origin:
    """The one place that decides what a start goes on from: a function of the facts, and of nothing else."""
    step, stored = found.checkpoint or 0, found.stored
    use: StoredStateUse = "replace"
    said = ""
    if stored is not None:
        stands = f"{stored.words} stands at {stored.step} completed steps"
        if stored.owner == "current" and stored.step >= step:
            use, step, said = "continue", stored.step, f"{stands}: the run goes on from there"
        elif stored.volatile:
            said = f"{stands} and is passed over: {_why_passed_over(stored)}"
        elif stored.owner == "foreign":
            return _refused(
                f"{stands} and belongs to a run with another ledger: move it away, or choose another folder for this "
                "run's in backend.options"
            )
        elif stored.owner != "left" and stored.step <= step:
            said = f"{stands}, and the newest checkpoint at {step}: it is made again from the checkpoint"
        else:
            use = "set_aside"
            said = (
                f"{stands} and belongs to training that the run has left ({stored.left_by}): it is renamed to "
                f"{stored.folder}.superseded-N and not used any more; the run goes on from step {step}"
            )
    if found.from_scratch and (found.checkpoint is not None or step):
        return _refused(
            f"stands at step {step}, and --from-scratch is for runs without a whole checkpoint: leave it out"
        )
    if found.checkpoint is None and not step and found.lost and not (found.from_scratch or found.gave_up_lost):
        listed = ", ".join(f"step {lost}: {what}" for lost, what in found.lost)
        return _refused(
            f"no whole checkpoint is left of those that the run had ({listed}): restore one from a copy, name another "
            "--run, or begin again at step 0 with --from-scratch, which the ledger records"
        )
    if step >= found.last_step and not (use == "continue" and stored is not None and stored.unfinished):
        kind = OriginKind.COMPLETE
    elif use == "continue":
        kind = OriginKind.STORED_STATE
    elif found.checkpoint is not None:
        kind = OriginKind.CHECKPOINT
    else:
        kind = OriginKind.START_FROM if found.start_from else OriginKind.FRESH
    return Origin(kind, step, use, said)


def _why_passed_over(stored: StoredFacts) -> str:
    if stored.owner == "foreign":
        return "the ledger does not know the training that made it"
    return f"the run has left that training ({stored.left_by})" if stored.owner == "left" else "a checkpoint is newer"


def _refused(reason: str) -> Origin:
    return Origin(OriginKind.REFUSED, reason=reason)
