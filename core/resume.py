"""How a run starts: `decide` checks everything that can be refused and writes nothing; `commit` records the decision.

Between the two stand `Backend.prepare` and `Run.import_state`, which can refuse as well. Only `commit` changes the
run's folder, just before training begins, so a start that is refused leaves the folder as it was.

    start = decide(folder, recipe, source, backend, options, runs, allow=.., say=..)   # raises; writes nothing
    run = prepare_run(backend, Job(start.resolved, start.plan, weights=start.weights, segment=start.segment,
    stored_state=start.stored_state))
    if start.state is not None: run.import_state(start.state)
    ledger = commit(start, environment)                                                # then train from
    start.first_step
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weftrain.core import checkpoint
from weftrain.core.backend import Backend, BatchSource, Plan, State, StoredState, StoredStateUse
from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError, RunFolderError
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.lazy_tensors import select
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.run.continuation import check_amounts, data_of_start, recipe_of
from weftrain.core.run.ledger import TORN, Ledger, read_ledger, torn_bytes
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import TrainingSegment, lineage, tokens_before
from weftrain.core.run.metrics import METRICS, damaged_lines, effective_records, repair
from weftrain.core.run.metrics import TORN as METRICS_TORN
from weftrain.core.run.own_checkpoints import Standing, check_from_scratch, standing
from weftrain.core.run.rollback import finish_rollback
from weftrain.core.run.run_folder import ABSENT, RecipeCheck, RunFolder, blamed, differences, follows, with_defaults
from weftrain.core.run.source_cursors import cursors_of
from weftrain.core.run.start_weights import WHOLE_STATE, GrownWeights, check_fit, check_function, grown_rows
from weftrain.core.run.stored_state import Measured, Unfinished, completed, is_unfinished, judge, made_by


@dataclass(frozen=True)
class Start:
    """How a run starts. Nothing of it is written yet.

    At most one of `state` and `weights` is given; with neither, the weights are drawn from the seed or the backend's
    own state holds.
    """

    plan: Plan  # from the completed steps that it starts at
    state: State | None  # for Run.import_state
    weights: Mapping[str, Tensor] | None  # for Job.weights
    parent: str | None  # root of the checkpoint that the next one continues
    manifest: Mapping[str, Any] | None  # of the run's own checkpoint that it resumes from
    tokens: int  # read so far, on this run's own line
    position: int  # number of the next sample
    recipe: RecipeCheck
    own: Standing  # what its checkpoints and its ledger say together
    damaged_metrics: tuple[int, ...]  # lines of metrics.jsonl by number, which are moved aside
    decided: Mapping[str, Any]  # what the ledger's line says beside: see ledger_lines.Begin
    segment: str  # a new name for what is trained from here on, for the ledger and for state that the backend keeps
    stored_state: StoredStateUse  # what becomes of the state that the backend itself keeps
    unfinished: Unfinished | None  # the last step of such a state, where the record lacks what the plan wants of it
    # what was recorded since the checkpoint before it, where the run goes on from such a state
    measured: Measured | None
    folder: RunFolder  # with the recipe that this start resolves to
    resolved: Recipe  # the recipe asked for, with `data.continues` where its data goes on from other data
    source: BatchSource  # the rows of that recipe

    @property
    def first_step(self) -> int:
        return self.plan.start_step

    @property
    def last_step(self) -> int:
        return self.plan.last_step

    @property
    def complete(self) -> bool:
        return self.first_step >= self.last_step and self.unfinished is None

    @property
    def resumed_step(self) -> int | None:
        """For MetricsWriter: what lies beyond this step no longer counts. None for a run that starts afresh."""
        return self.first_step if self.parent is not None or self.first_step else None


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
) -> Start:
    """Find what the run starts from, and ask everything about it that can be refused. Nothing is written.

    runs: the folder that holds other runs, for start_from. allow: keys of the recipe that may have changed. say: gets
    one line for each thing the user should know. from_scratch: begin at step 0 where all checkpoints are lost.
    repair_ledger: enter checkpoints that the ledger lost. heldout: names of the held-out sets. Raises CheckpointError,
    RunFolderError, BackendError.
    """
    folder.check_writable()
    entries = read_ledger(folder.path / LEDGER)
    damaged = _tell_repairs(folder.path, say)
    own = standing(folder.path, entries, repair_ledger, say)
    stored = backend.stored_state(recipe, options, folder.path)
    begun = own.newest is None and completed(stored, entries) > 0  # so what it started from may have gone, or gone on
    found = None if begun else starting_state(recipe, own.newest, runs, lambda line: say(f"warning: {line}"))
    first = 0 if found is None else found.state.step
    verdict = judge(stored, entries, first, backend.name)
    if verdict.said:
        say(verdict.said)
    manifest = None if found is None else found.manifest
    checked = _check_changes(folder, found, source.dataset_id, allow)
    unfinished = measured = made = None
    if goes_on := stored if verdict.use == "continue" else None:
        _check_stored_data(goes_on, source.dataset_id, allow)
        since = 0 if manifest is None else first  # step of the run's own newest checkpoint
        first = goes_on.step
        made = made_by(goes_on, entries)
        before = recipe_of(made.recipe, folder.path)
        unfinished, measured = _recorded(
            effective_records(folder.path, damaged), goes_on, before, since, entries, heldout
        )
        if unfinished is not None:
            told = cursors_of(recipe, before, first, made.dataset_id) or {}
            unfinished = replace(unfinished, dataset_id=made.dataset_id, sources=told)
    check_from_scratch(folder.path, own, first, from_scratch)
    drawn = {} if found is None else found.check_model(recipe, say)
    weights = None if found is None else found.weights()
    if unfinished is not None:
        say(
            f"the process before ended while step {first} was being recorded: what is missing in its record is "
            "recorded now"
        )
    foreign = None if found is None else found.foreign
    continued = data_of_start(folder.path, recipe, source, first, manifest, foreign, made)
    folder = replace(folder, recipe=parse_json(canonical_json(continued.recipe.model_dump(mode="json"))))
    checked = folder.check_recipe(allow, None if manifest is None else manifest["recipe"])
    for key, old, new in checked.changes:
        if not follows(key):
            say(f"recipe changed at step {first}: {key}: {old} -> {new}")
    for line in (*continued.notes, *check_amounts(continued.recipe, continued.source)):
        say(line)
    segment = secrets.token_hex(16)
    return Start(
        plan=plan_of(recipe, first),
        state=found.state if found is not None and found.has_optimizer and goes_on is None else None,
        weights=GrownWeights(weights, drawn, recipe.model, recipe.seed) if weights is not None and drawn else weights,
        parent=_parent(found, entries, made),
        manifest=manifest,
        tokens=tokens_before(first, manifest, lineage(entries)),
        position=continued.position(first),
        recipe=checked,
        own=own,
        damaged_metrics=damaged,
        decided={
            "passed_over": own.passed_over,
            "drawn": {} if first else drawn,
            "from_scratch": from_scratch and bool(own.passed_over),
            "repaired": repair_ledger and own.newest is not None and (not entries or len(own.to_enter) > 1),
            "stretch": segment,
            "continues": verdict.continues,
        },
        segment=segment,
        stored_state=verdict.use,
        unfinished=unfinished,
        measured=measured,
        folder=folder,
        resolved=continued.recipe,
        source=continued.source,
    )


def _check_changes(folder: RunFolder, found: Found | None, dataset_id: str, allow: Set[str]) -> RecipeCheck:
    """Refuse a recipe or a dataset that has changed without being allowed to, both at once. Raises RunFolderError,
    CheckpointError.
    """
    manifest = None if found is None else found.manifest
    other = manifest is not None and manifest["dataset_id"] != dataset_id and "data" not in allow
    try:
        checked = folder.check_recipe(allow, None if manifest is None else manifest["recipe"])
    except RunFolderError as error:
        raise RunFolderError(f"{error}{' --allow data' if other else ''}") from None
    if manifest is not None and other:
        raise CheckpointError(
            f"step {manifest['step']}: was trained on dataset {manifest['dataset_id'][:12]}, the recipe's is "
            f"{dataset_id[:12]}: "
            "restore the dataset, or continue on the other one with --allow data"
        )
    return checked


def plan_of(recipe: Recipe, first_step: int) -> Plan:
    """The recipe's plan from `first_step` completed steps on, which may lie beyond its end."""
    return Plan(
        first_step,
        max(first_step, recipe.schedule.steps),
        checkpoint_every_steps=recipe.checkpoint.every_steps,
        evaluate_every_steps=recipe.log.evaluate_every_steps,
        log_every_steps=recipe.log.every_steps,
        checkpoint_at_end=recipe.checkpoint.at_end,
        chunk_steps=0 if recipe.data.chunks is None else recipe.schedule.steps // recipe.data.chunks,
    )


def _check_stored_data(stored: StoredState, dataset_id: str, allow: Set[str]) -> None:
    if stored.dataset_id not in (None, dataset_id) and "data" not in allow:
        raise CheckpointError(
            f"{stored.where}: was trained on dataset {str(stored.dataset_id)[:12]}, the recipe's is {dataset_id[:12]}: "
            "restore the dataset, or "
            "continue on the other one with --allow data"
        )


def _recorded(
    measured: Iterable[Mapping[str, Any]],
    stored: StoredState,
    before: Recipe,
    since: int,
    entries: Sequence[Mapping[str, Any]],
    heldout: Collection[str],
) -> tuple[Unfinished | None, Measured]:
    """What the record lacks of the last step of the state that the run goes on from, and what it has after checkpoint
    `since`.
    """
    records = list(measured)
    plan = plan_of(before, stored.step)
    unfinished = None
    if is_unfinished(stored, plan, since, entries, records, heldout):
        assert stored.result is not None
        unfinished = Unfinished(stored.result, before, plan, stored.dataset_id or "", {})
    last = stored.step - (unfinished is not None)
    found = [
        record for record in records if record["kind"] in ("step", "evaluation") and since < record["step"] <= last
    ]
    return unfinished, Measured(since, found)


def _parent(found: Found | None, entries: Sequence[Mapping[str, Any]], made: TrainingSegment | None) -> str | None:
    """Root of the checkpoint before what is trained next.

    Where the backend's own state holds, which the segment `made` trained, that is the last one of the ledger's line,
    also if its folder is damaged or gone, or else what that segment began from; unless `found` is one that the ledger
    does not list yet.
    """
    points = lineage(entries).checkpoints
    if made is None or (found is not None and all(point.root != found.root for point in points)):
        return None if found is None else found.root
    return points[-1].root if points else made.parent


def _tell_repairs(run: Path, say: Callable[[str], None]) -> tuple[int, ...]:
    """Say which damaged lines of ledger and metrics `settle` will move aside. The numbers of those of the metrics."""
    if torn := torn_bytes(run / LEDGER):
        say(f"warning: {run / LEDGER}: a crash tore the last line: its {torn} bytes are moved to {TORN}")
    damaged = tuple(damaged_lines(run))
    for number in damaged:
        say(f"warning: {run / METRICS}:{number}: not a metrics line: it is moved to {METRICS_TORN}")
    return damaged


def settle(start: Start) -> Ledger:
    """Finish what a crash left half done: torn lines, a rollback's moves, checkpoints not yet entered. All there is to
    do for a complete run; `commit` begins with it. Nothing is written where nothing is left. Raises RunFolderError.
    """
    folder = start.folder
    ledger = Ledger(folder.path)
    finish_rollback(folder.path, ledger)
    with blamed(folder.path):
        repair(folder.path, start.damaged_metrics)
    ledger.finish_chunk()
    for manifest in start.own.to_enter:
        ledger.adopt(manifest, effective_records(folder.path), "repair" if start.decided["repaired"] else "resume")
    return ledger


def commit(start: Start, environment: dict[str, Any]) -> Ledger:
    """Record the start in the run's folder and ledger, which is returned, open. To be called once training is about to
    begin.

    environment: the run's fingerprint, JSON values. Raises RunFolderError.
    """
    ledger, folder = settle(start), start.folder
    resolved = folder.recipe
    # by the ledger itself: an earlier version's keys, or of a start that a crash ended, differ too
    told = lineage(ledger.entries).recipe
    if told and sha256_json(told) != sha256_json(resolved):
        changes = differences(with_defaults(told), resolved)
        listed = [[key, *(None if value is ABSENT else value for value in values)] for key, *values in changes]
        ledger.add(
            "recipe", step=start.first_step, changes=listed, recipe=resolved, recipe_sha256=sha256_json(resolved)
        )
    # after the ledger's line: a crash in between asks for the change again
    folder.record_recipe(start.recipe, start.first_step)
    folder.write_environment(environment)
    ledger.open_run(start.first_step, resolved, start.source.dataset_id, environment, start.parent, **start.decided)
    return ledger


@dataclass(frozen=True)
class Found:
    """A checkpoint to start from: its state, its root hash, and its manifest: of the run's own (a resume) or of
    another's (start_from).
    """

    state: State
    root: str
    manifest: Mapping[str, Any] | None  # None: another run's checkpoint, by start_from
    foreign: Mapping[str, Any] | None = None  # the manifest of that one

    @property
    def has_optimizer(self) -> bool:
        return any(not name.startswith("weights/") for name in self.state.tensors)

    def check_model(self, recipe: Recipe, say: Callable[[str], None]) -> dict[str, tuple[int, int]]:
        """Refuse tensors that are not those of the recipe's model. Rows [first, stop) of parameters that
        start_from.grow lets be drawn.

        Raises CheckpointError. Keys without a shape are compared for another run's checkpoint alone: a resume compares
        all keys.
        """
        planes = WHOLE_STATE if self.has_optimizer else ("weights",)
        if self.manifest is not None:
            check_fit(self.manifest, recipe.model, f"the run's checkpoint of step {self.state.step}", planes)
            return {}
        assert self.foreign is not None
        assert recipe.start_from is not None
        where = f"start_from: step {self.foreign['step']} of run '{recipe.start_from.run}'"
        check_fit(self.foreign, recipe.model, where, planes, recipe.start_from.grow)
        for line in check_function(self.foreign, recipe.model, where, recipe.start_from.change):
            say(f"{where}: {line}")
        drawn = grown_rows(self.foreign, recipe.model)
        for name, (first, stop) in drawn.items():
            say(f"{where}: rows {first}..{stop - 1} of {name} are drawn from seed {recipe.seed}")
        return drawn

    def weights(self) -> Mapping[str, Tensor] | None:
        """Canonical name -> weight where that is all there is to start from; None where the whole state is imported."""
        return None if self.has_optimizer else checkpoint.Weights(self.state.tensors)


def starting_state(recipe: Recipe, newest: Path | None, runs: Path, report: Callable[[str], None]) -> Found | None:
    """What `newest` holds, the run's own newest checkpoint, already verified; else, where the recipe says `start_from`,
    the newest whole one of another run below `runs`, at step 0; else None: from scratch.

    `report` gets one line for each damaged checkpoint passed over. Raises CheckpointError where start_from finds none.
    """
    if newest is not None:
        state, manifest = checkpoint.load(newest, verified=True)
        return Found(state, manifest["root"], manifest)
    if recipe.start_from is None:
        return None
    other = runs / recipe.start_from.run / "checkpoints"
    newest = checkpoint.newest(other, report)
    if newest is None:
        name = recipe.start_from.run
        raise CheckpointError(
            f"{other}: no whole checkpoint, and start_from needs one: train '{name}' first, or remove start_from"
        )
    state, manifest = checkpoint.load(newest, verified=True)
    if recipe.start_from.state == "weights":
        return Found(
            State(0, 0, select(state.tensors, {name: name for name in state.tensors if name.startswith("weights/")})),
            manifest["root"],
            None,
            manifest,
        )
    return Found(replace(state, step=0), manifest["root"], None, manifest)
