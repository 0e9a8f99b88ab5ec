"""How a run starts. `decide` finds what it goes on from (core/run/origin.py) and checks everything that can be refused,
and `commit` records the decision.

Between `decide` and `commit` stand `Backend.prepare` and `Run.import_state`, which can refuse as well. Only `commit`
changes the run's folder, so a start that is refused leaves the folder as it was.

    start = decide(folder, recipe, source, backend, options, runs, allow=.., say=..)   # raises; writes nothing
    run = prepare_run(backend, start.job(options))
    if start.state is not None: run.import_state(start.state)
    ledger = commit(start, environment)                                   # then fit(run, start.plan, ..) trains
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weftrain.core.backend import Backend, Job, Plan, State, plan_of
from weftrain.core.checkpoint import Weights
from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.errors import CheckpointError, DataError, RunFolderError
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.order.batch import BatchSource
from weftrain.core.run.checked_metrics import remember
from weftrain.core.run.continuation import Continued, check_amounts, data_of_start, recipe_of
from weftrain.core.run.first_model import first_weights, saves_first_model
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.lineage import TrainingSegment, lineage, tokens_before
from weftrain.core.run.metrics import METRICS, MetricsWriter, effective_records, repair
from weftrain.core.run.origin import Origin, OriginKind, find_origin
from weftrain.core.run.retention import finish_removals
from weftrain.core.run.rollback import finish_rollback
from weftrain.core.run.run_folder import (
    ABSENT,
    RecipeCheck,
    RunFolder,
    differences,
    folder_errors,
    follows,
    planned,
    recipe_at,
    with_defaults,
)
from weftrain.core.run.situation import FoundRun, examine
from weftrain.core.run.starting_checkpoint import (
    OpenFolder,
    OpenPlace,
    StartingCheckpoint,
    local_place,
    other_checkpoint,
)
from weftrain.core.saving import History


@dataclass(frozen=True)
class Start:
    """How a run starts: all of it is checked, nothing is written yet.

    At most one of `state` and `weights` is given; without either, the weights are drawn from the seed or are in the
    backend's stored state.
    """

    origin: Origin
    plan: Plan  # from the completed steps that it starts at
    state: State | None  # for Run.import_state
    weights: Mapping[str, Tensor] | None  # for Job.weights
    first_weights: Mapping[str, Tensor] | None  # for Job.first_weights
    history: History  # for fit
    recipe: Recipe  # the one asked for, with `data.continues` if its data goes on from other data
    source: BatchSource  # the rows of that recipe
    folder: RunFolder  # with that recipe
    checked: RecipeCheck
    found: FoundRun  # what lies in the folder
    segment: str  # a new name for what is trained from here on, for the ledger and the backend's stored state
    entry: Mapping[str, Any]  # what the ledger's line says besides: see ledger_schema.BeginLine

    @property
    def complete(self) -> bool:
        return self.origin.kind is OriginKind.COMPLETE

    @property
    def resumed_step(self) -> int | None:
        """For MetricsWriter: what lies beyond this step no longer counts. None for a run that begins, from whatever."""
        begins = self.origin.kind in (OriginKind.FRESH, OriginKind.START_FROM)
        goes_on = self.history.parent is not None or self.plan.start_step
        return self.plan.start_step if goes_on and not begins else None

    def job(self, options: StrictModel, **more: Any) -> Job:
        """What the backend is told. more: fields of Job that concern this process."""
        return Job(
            self.recipe,
            self.plan,
            options,
            self.weights,
            self.first_weights,
            folder=self.folder.path,
            segment=self.segment,
            stored_state=self.origin.stored_state,
            **more,
        )


def decide(
    folder: RunFolder,
    recipe: Recipe,
    source: BatchSource,
    backend: Backend,
    options: StrictModel,
    runs: Path,
    *,
    allow: Set[str],
    say: Callable[[str], None],
    from_scratch: bool = False,
    repair_ledger: bool = False,
    heldout: Collection[str] = (),
    open_folder: OpenFolder | None = None,
    open_place: OpenPlace = local_place,
) -> Start:
    """Find what the run starts from, and check everything about it that can be refused. Nothing is written.

    runs: the folder that holds other runs, for start_from. allow: keys of the recipe that may have changed. say: gets
    one line for each thing the user should know. from_scratch: begin at step 0 if all checkpoints are lost.
    repair_ledger: enter checkpoints that the ledger lost. heldout: names of the held-out sets. open_folder: reads a
    Hugging Face folder; open_place: finds start_from.folder, which may be an address or a release. Raises
    CheckpointError, RunFolderError, BackendError, DataError.
    """
    folder.check_writable()
    found = examine(folder, recipe, backend, options, say, repair_ledger, heldout)
    origin = find_origin(found.situation(recipe, from_scratch))
    if origin.kind is OriginKind.REFUSED:
        raise RunFolderError(f"{folder.path}: {origin.reason}")
    if origin.said:
        say(origin.said)
    if origin.stored_state != "continue":
        found = found.without_stored_state()
    start = found.checkpoint
    if origin.kind is OriginKind.START_FROM:
        start = other_checkpoint(recipe, runs, lambda line: say(f"warning: {line}"), open_folder, open_place)
        origin = replace(origin, step=_first_step(recipe, start))
    if (staged := recipe.at(origin.step)) is not recipe:
        recipe, source = staged, training_source(staged)
    asked = _Asked(replace(folder, recipe=_as_json(recipe)), recipe, source, allow, from_scratch, repair_ledger)
    return _checked_start(asked, origin, found, start, say)


@dataclass(frozen=True)
class _Asked:
    """What a start asks for: the recipe with the changes due by then, its rows, and what it allows."""

    folder: RunFolder
    recipe: Recipe
    source: BatchSource
    allow: Set[str]
    from_scratch: bool
    repair_ledger: bool


def _first_step(recipe: Recipe, start: StartingCheckpoint) -> int:
    """The completed steps with which a run by start_from begins. Raises CheckpointError, RunFolderError where its steps
    cannot be counted on.
    """
    assert recipe.start_from is not None
    if recipe.start_from.steps == "from_start":
        return 0
    step, steps = start.state.step, recipe.schedule.steps
    where = f"start_from: step {step} of {recipe.start_from.source}"
    if step >= steps:
        raise RunFolderError(
            f"{where}: is all of the recipe's schedule.steps {steps}, so nothing is left to train: set schedule.steps "
            "to more, or start_from.steps to from_start"
        )
    if recipe.objective.keeps_first_model:
        raise RunFolderError(
            f"{where}: objective {recipe.objective.name} reads the model that its run began with, which is not that "
            "checkpoint's: give start_from steps: from_start"
        )
    return step


def _checked_start(
    asked: _Asked,
    origin: Origin,
    found: FoundRun,
    start: StartingCheckpoint | None,
    say: Callable[[str], None],
) -> Start:
    """A start from what was found, once recipe, model and data are checked. Raises as `decide` does."""
    recipe, folder, step = asked.recipe, asked.folder, origin.step
    _check_changes(folder, found, asked.source.dataset_id, asked.allow, step)
    drawn = {} if start is None else start.check_model(recipe, say)
    foreign = None if start is None or start.own else start
    history = _history(found, start, step, recipe, say)
    told = None if foreign is None else foreign.manifest
    continued = data_of_start(folder.path, recipe, asked.source, step, found.manifest, told, found.made)
    folder = replace(folder, recipe=_as_json(continued.recipe))
    checked = folder.check_recipe(asked.allow, None if found.manifest is None else found.manifest["recipe"], step)
    _tell_changes(checked, continued, step, say)
    segment = secrets.token_hex(16)
    entry = found.entry(segment, {} if foreign is None else drawn, asked.from_scratch, asked.repair_ledger)
    return Start(
        origin,
        plan_of(recipe, step),
        state=start.state if start is not None and start.has_optimizer and found.made is None else None,
        weights=None if start is None else start.weights(recipe, drawn),
        first_weights=_first_weights(folder.path, continued.recipe, origin, start, found),
        history=history,
        recipe=continued.recipe,
        source=continued.source,
        folder=folder,
        checked=checked,
        found=found,
        segment=segment,
        entry=entry | {"parent_release": None if foreign is None else foreign.release},
    )


def _first_weights(
    folder: Path, recipe: Recipe, origin: Origin, start: StartingCheckpoint | None, found: FoundRun
) -> Mapping[str, Tensor] | None:
    """Of the model that the run began with, where its objective reads it and `start.weights` is not that model."""
    if origin.kind is OriginKind.COMPLETE:
        return None
    if start is None or (origin.step and start.own):
        return first_weights(recipe, lineage(found.entries), folder)
    return Weights(start.state.tensors) if recipe.objective.keeps_first_model and start.has_optimizer else None


def _as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it reads back: tuples become lists."""
    tree: dict[str, Any] = parse_json(canonical_json(recipe.model_dump(mode="json")))
    return tree


def _history(
    found: FoundRun, start: StartingCheckpoint | None, step: int, recipe: Recipe, say: Callable[[str], None]
) -> History:
    unfinished = found.told_unfinished(recipe)
    if unfinished is not None:
        say(f"the process before ended while step {step} was being recorded: what its record lacks is recorded now")
    foreign = None if start is None or start.own else start
    counted = found.manifest if foreign is None or not step else foreign.manifest
    tokens = tokens_before(step, counted, lineage(found.entries))
    parent = _parent(start, found.entries, found.made)
    keeps = foreign is not None and _keeps_start(recipe, foreign)
    return History(parent, tokens, unfinished, found.measured, keeps)


def _keeps_start(recipe: Recipe, foreign: StartingCheckpoint) -> bool:
    """Whether a run that begins from another's checkpoint saves that state as its own first checkpoint: the first link
    of its release begins there, and is tied to the release that it is of; an objective may read it.
    """
    assert recipe.start_from is not None
    goes_on = foreign.release is not None or recipe.start_from.steps == "continue"
    return goes_on or recipe.data.chunks is not None or saves_first_model(recipe)


def _tell_changes(checked: RecipeCheck, continued: Continued, step: int, say: Callable[[str], None]) -> None:
    """Tell the user what changes in recipe and data. Raises DataError if the run would read more than there is."""
    for key, old, new in checked.changes:
        if not (follows(key) or planned(key)):
            say(f"recipe changed at step {step}: {key}: {old} -> {new}")
    for line in (*continued.notes, *check_amounts(continued.recipe, continued.source)):
        say(line)


def _check_changes(folder: RunFolder, found: FoundRun, dataset_id: str, allow: Set[str], step: int) -> None:
    """Refuse a recipe or dataset that changed without permission. Raises RunFolderError, CheckpointError."""
    manifest, stored = found.manifest, found.stored
    recorded = None if manifest is None else manifest["recipe"]
    trained = {} if manifest is None else {f"step {manifest['step']}": manifest["dataset_id"]}
    if stored is not None and stored.dataset_id is not None:
        trained[str(stored.where)] = stored.dataset_id
    other = {} if "data" in allow else {where: id for where, id in trained.items() if id != dataset_id}
    other = {at: id for at, id in other.items() if not _by_plan(found, folder.path, step, id, dataset_id)}
    try:
        folder.check_recipe(allow, recorded, step)
    except RunFolderError as error:
        raise RunFolderError(f"{error}{' --allow data' if other else ''}") from None
    for where, trained_on in other.items():
        raise CheckpointError(
            f"{where}: was trained on dataset {trained_on[:12]}, the recipe's is {dataset_id[:12]}: restore the "
            "dataset, or continue on the other one with --allow data"
        )


def _by_plan(found: FoundRun, run: Path, step: int, trained_on: str, dataset_id: str) -> bool:
    """Whether a planned change, due at `step`, leads from the datasets read so far to the recipe's: both lie as they
    were.
    """
    recorded = None if found.manifest is None else found.manifest["recipe"]
    record = recorded if found.made is None else found.made.recipe
    if record is None or (after := (before := recipe_of(record, run)).at(step)) is before:
        return False
    try:
        return (training_source(before).dataset_id, training_source(after).dataset_id) == (trained_on, dataset_id)
    except DataError:
        return False


def _parent(
    start: StartingCheckpoint | None, entries: Sequence[Mapping[str, Any]], made: TrainingSegment | None
) -> str | None:
    """Root of the checkpoint before what is trained next: that of `start`, if there is no stored state.

    A stored state, which the segment `made` trained, follows the last checkpoint of the ledger's line, even if its
    folder is damaged or gone, or else what that segment began from; unless the ledger does not list `start` yet.
    """
    points = lineage(entries).checkpoints
    if made is None or (start is not None and all(point.root != start.root for point in points)):
        return None if start is None else start.root
    return points[-1].root if points else made.parent


def settle(start: Start) -> Ledger:
    """Finish what a crash left half done: torn lines, a rollback's moves, removals, checkpoints not yet entered.

    It is all there is to do for a complete run, and `commit` begins with it. Raises RunFolderError.
    """
    folder = start.folder
    ledger = Ledger(folder.path)
    finish_rollback(folder.path, ledger)
    finish_removals(folder.path, ledger)
    with folder_errors(folder.path):
        repair(folder.path, start.found.damaged_metrics)
        if start.found.checked_metrics is not None:
            remember(folder.path / METRICS, start.found.checked_metrics)
    ledger.finish_chunk()
    for manifest in start.found.own.to_enter:
        ledger.adopt(manifest, effective_records(folder.path), "repair" if start.entry["repaired"] else "resume")
    return ledger


def enter_end(start: Start, ledger: Ledger) -> None:
    """Write that a complete run ended, where a crash or a request to stop came first: those who follow the run wait for
    that line. Raises RunFolderError.
    """
    kinds = [entry["kind"] for entry in ledger.entries if entry["kind"] in ("start", "resume", "end")]
    if kinds and kinds[-1] != "end":
        done = start.plan.start_step
        with MetricsWriter(start.folder.path, begins=False) as metrics:
            metrics.event("end", step=done)
        ledger.add("end", step=done)


def commit(start: Start, environment: dict[str, Any]) -> Ledger:
    """Record the start in the run's folder and ledger, which is returned, open. Call it once training is about to
    begin.

    environment: the run's fingerprint, JSON values. Raises RunFolderError.
    """
    ledger, folder, step = settle(start), start.folder, start.plan.start_step
    recipe, sha256 = folder.recipe, sha256_json(folder.recipe)
    # Compared with the ledger's own recipe: keys of an earlier version, or of a start that a crash ended, differ too.
    told = lineage(ledger.entries).recipe
    if told and sha256_json(told) != sha256:
        known = with_defaults(told) or {}
        changes = [change for change in differences(known, recipe) if not planned(change[0])]
        changes += [change for change in differences(recipe_at(known, step), recipe) if planned(change[0])]
        why = [plan["reason"] for plan in known.get("changes", ()) if plan["step"] <= step and plan.get("reason")]
        listed = [[key, *(None if value is ABSENT else value for value in values)] for key, *values in changes]
        given = {"reason": "; ".join(why)} if why else {}
        ledger.add("recipe", step=step, changes=listed, recipe=recipe, recipe_sha256=sha256, **given)
    folder.record_recipe(start.checked, step)  # after the ledger's line: a crash in between asks for the change again
    folder.write_environment(environment)
    ledger.open_run(step, recipe, start.source.dataset_id, environment, start.history.parent, **start.entry)
    return ledger
