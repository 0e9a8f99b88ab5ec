"""What lies in a run's folder when `train` starts it: `examine` reads it, and `Situation` holds the facts by which
core/resume.py decides what the run goes on from. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weftrain.core.backend import Backend, StoredState, plan_of
from weftrain.core.config import Recipe
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.run.checked_metrics import CheckedPart, check_metrics
from weftrain.core.run.continuation import recipe_of
from weftrain.core.run.ledger import TORN, read_ledger, torn_bytes
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import TrainingSegment
from weftrain.core.run.metrics import METRICS, effective_records
from weftrain.core.run.metrics import TORN as METRICS_TORN
from weftrain.core.run.own_checkpoints import Standing, standing
from weftrain.core.run.run_folder import RunFolder
from weftrain.core.run.source_cursors import cursors_of
from weftrain.core.run.starting_checkpoint import StartingCheckpoint, own_checkpoint
from weftrain.core.run.stored_state import (
    Measured,
    Owner,
    Unfinished,
    completed,
    is_unfinished,
    left_by,
    made_by,
    owner_of,
)


@dataclass(frozen=True)
class StoredFacts:
    """The state that a backend stores, as far as it matters for a start. words: its name in messages. unfinished: the
    record lacks something of its last step. left_by: what of the ledger left it, if the owner is "left".
    """

    step: int
    owner: Owner
    unfinished: bool = False
    words: str = "the backend's own state"
    folder: str = "store"
    left_by: str = ""
    volatile: bool = False


@dataclass(frozen=True)
class Situation:
    """All facts that decide what a start goes on from."""

    last_step: int  # of the recipe
    checkpoint: int | None = None  # completed steps of the run's newest whole checkpoint
    lost: tuple[tuple[int, str], ...] = ()  # newer checkpoints: step, and "damaged" or "missing"
    gave_up_lost: bool = False  # the run's last start was one from scratch, which accepted that loss
    stored: StoredFacts | None = None
    start_from: bool = False  # the recipe names another run to start from
    from_scratch: bool = False  # the user asks to begin at step 0 although checkpoints are lost


@dataclass(frozen=True)
class FoundRun:
    """What lies in a run's folder. made, unfinished, measured: of a stored state on the run's line."""

    entries: Sequence[Mapping[str, Any]]
    damaged_metrics: tuple[int, ...]
    own: Standing
    checkpoint: StartingCheckpoint | None
    stored: StoredState | None
    facts: StoredFacts | None
    made: TrainingSegment | None
    unfinished: Unfinished | None
    measured: Measured | None
    checked_metrics: CheckedPart | None = None  # what of the metrics was found whole

    @property
    def manifest(self) -> Mapping[str, Any] | None:
        """Of the run's own checkpoint."""
        return None if self.checkpoint is None else self.checkpoint.manifest

    def without_stored_state(self) -> FoundRun:
        """For a start that does not go on from the backend's stored state."""
        return replace(self, stored=None, facts=None, made=None, unfinished=None, measured=None)

    def situation(self, recipe: Recipe, from_scratch: bool) -> Situation:
        return Situation(
            recipe.schedule.steps,
            None if self.checkpoint is None else self.checkpoint.state.step,
            self.own.passed_over,
            self.own.began_again,
            self.facts,
            recipe.start_from is not None,
            from_scratch,
        )

    def told_unfinished(self, recipe: Recipe) -> Unfinished | None:
        """The unfinished step with how far each source had been read, as the datasets of `recipe` tell it."""
        if self.unfinished is None or self.made is None:
            return None
        step, dataset_id = self.unfinished.result.step + 1, self.made.dataset_id
        sources = cursors_of(recipe, self.unfinished.recipe, step, dataset_id) or {}
        return replace(self.unfinished, dataset_id=dataset_id, sources=sources)

    def entry(self, segment: str, drawn: Mapping[str, Any], from_scratch: bool, repair_ledger: bool) -> dict[str, Any]:
        """What the ledger's line says besides where training begins: see ledger_schema.BeginLine."""
        repaired = self.own.newest is not None and (not self.entries or len(self.own.to_enter) > 1)
        return {
            "passed_over": self.own.passed_over,
            "drawn": drawn,
            "from_scratch": from_scratch and bool(self.own.passed_over),
            "repaired": repair_ledger and repaired,
            "stretch": segment,
            "continues": None if self.stored is None else self.stored.segment,
        }


def examine(
    folder: RunFolder,
    recipe: Recipe,
    backend: Backend,
    options: StrictModel,
    say: Callable[[str], None],
    repair_ledger: bool,
    heldout: Collection[str],
) -> FoundRun:
    """Read what lies in the run's folder. Raises CheckpointError, RunFolderError, BackendError."""
    run = folder.path
    entries = read_ledger(run / LEDGER)
    damaged, checked = _tell_repairs(run, say)
    stored = backend.stored_state(recipe, options, run)
    in_memory = completed(stored, entries) if stored is not None and stored.volatile else 0
    own = standing(run, entries, repair_ledger, say, lambda newest: 0 < in_memory >= newest)
    own_newest = None if own.newest is None else own_checkpoint(own.newest)
    facts = made = unfinished = measured = None
    if stored is not None:
        owner, since = owner_of(stored, entries), 0 if own_newest is None else own_newest.state.step
        if owner == "current" and stored.step >= since:
            made = made_by(stored, entries)
            before = recipe_of(made.recipe, run)
            records = list(effective_records(run, damaged))
            if is_unfinished(stored, plan_of(before, stored.step), since, entries, records, heldout):
                assert stored.result is not None
                unfinished = Unfinished(stored.result, before, plan_of(before, stored.step), "", {})
            last, kinds = stored.step - (unfinished is not None), ("step", "evaluation")
            records = [record for record in records if record["kind"] in kinds and since < record["step"] <= last]
            measured = Measured(since, records)
        words = f"the {backend.name} backend's own state in {stored.where}"
        left = left_by(entries) if owner == "left" else ""
        lacks = unfinished is not None
        facts = StoredFacts(stored.step, owner, lacks, words, stored.where.name, left, stored.volatile)
    return FoundRun(entries, damaged, own, own_newest, stored, facts, made, unfinished, measured, checked)


def _tell_repairs(run: Path, say: Callable[[str], None]) -> tuple[tuple[int, ...], CheckedPart | None]:
    """Say which damaged lines of ledger and metrics `settle` will move aside. The numbers of those of the metrics, and
    what of the metrics is whole.
    """
    if torn := torn_bytes(run / LEDGER):
        say(f"warning: {run / LEDGER}: a crash tore the last line: its {torn} bytes are moved to {TORN}")
    found, checked = check_metrics(run / METRICS) if (run / METRICS).exists() else ([], None)
    damaged = tuple(found)
    for number in damaged:
        say(f"warning: {run / METRICS}:{number}: not a metrics line: it is moved to {METRICS_TORN}")
    return damaged, None if damaged else checked
