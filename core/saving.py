"""When and how a run's state becomes a checkpoint, and which older ones are removed then: `Saver`, which `fit`
(core/trainer.py) tells to begin one.

A backend may copy its state and train on while the copy is written (`checkpoint.Saving.in_background`); then one
checkpoint is under way in a thread, and the next one begins after it, because it is the next one's parent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core import checkpoint
from weftrain.core.backend import Plan, Run
from weftrain.core.checkpoint import CheckpointInfo
from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError
from weftrain.core.formats import fsops
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.order.batch import BatchSource
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import Digest, MetricsWriter, effective_records
from weftrain.core.run.retention import Removal, archive, heldout_losses, plan, remove
from weftrain.core.run.stored_state import Measured, Unfinished


@dataclass(frozen=True)
class History:
    """What a run did before plan.start_step, as far as its record has to go on from it.

    parent: root hash of the checkpoint that the run continues from. tokens_read: positions read before plan.start_step.
    unfinished: the last step of a backend's stored state, if the process before ended while it was being recorded.
    measured: what was recorded since the checkpoint before such a state. keeps_start: whether the state that the run
    begins with, another's checkpoint, is saved as its first.
    """

    parent: str | None = None
    tokens_read: int = 0
    unfinished: Unfinished | None = None
    measured: Measured | None = None
    keeps_start: bool = False


class Saver:
    """Saves a run's state into the folder `checkpoints`, one checkpoint after the other, and enters each in metrics and
    ledger. However its `with` block ends, a checkpoint that was begun is finished.

    tokens_read: positions read since the run began, to be counted up by the caller (batch and sequence length may have
    changed at a resume).
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        recipe: Recipe,
        source: BatchSource,
        checkpoints: Path,
        metrics: MetricsWriter,
        ledger: Ledger,
        history: History,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._plan, self._recipe, self._source, self._folder = run, plan, recipe, source, checkpoints
        self._metrics, self._ledger, self._run_folder = metrics, ledger, checkpoints.parent
        self._parent, self._unfinished, self._keeps_start = history.parent, history.unfinished, history.keeps_start
        self.tokens_read = history.tokens_read - (self._unfinished.result.tokens if self._unfinished else 0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._under_way: tuple[Future[CheckpointInfo], dict[str, Any]] | None = None
        self._finished: CheckpointInfo | None = None
        self._measured_after = plan.start_step if history.measured is None else history.measured.after
        self._measured = Digest()  # of the records since the last checkpoint was begun
        for record in () if history.measured is None else history.measured.records:
            self._measured.add(record)
        self._keep = recipe.checkpoint.keep
        best = self._keep is not None and self._keep.best
        self._evaluations = list(effective_records(checkpoints.parent, kinds=("evaluation",))) if best else []
        self._archiving: tuple[Future[dict[int, str]], tuple[Removal, ...]] | None = None
        self._problems: list[str] = []
        self._clock, self._began_at = clock, clock()
        self._save_s = 0.0  # from the beginning of the last save until it was durable; before the first, unknown

    def __enter__(self) -> Saver:
        """Enter the first chunk in the ledger, unless the checkpoint of an unfinished step does."""
        if self._plan.start_step == self._plan.last_step:
            return self
        if self._unfinished is None or not self._unfinished.plan.wants_state(self._plan.start_step):
            if self._keeps_start and not (self._folder / folder_name(self._plan.start_step)).exists():
                self.begin()
                self._enter_finished(wait=True)
            else:
                self._ledger.chunk_begin(self._plan.start_step, self._recipe, self._source.dataset_id, self._parent)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._enter_finished(wait=True)
            self._remove_archived(wait=True)
        finally:
            self._thread.shutdown(wait=True)

    def measured(self, record: Mapping[str, Any]) -> None:
        """Count a record of metrics.jsonl into the digest that the next checkpoint's ledger line has, unless it is of
        the state that the run starts from.
        """
        if record["step"] > self._measured_after:
            self._measured.add(record)
        if record["kind"] == "evaluation" and self._keep is not None and self._keep.best:
            self._evaluations.append(dict(record))

    def begin(self, unfinished: Unfinished | None = None) -> None:
        """Start to save the run's state. unfinished: the step that made it, if the process before did not record it.

        Raises CheckpointError, also if the checkpoint before, which is finished first, failed.
        """
        self._began_at = self._clock()
        self._metrics.flush()  # so that a resume from this checkpoint finds every line up to it
        self._enter_finished(wait=True)
        state, fingerprint = self._run.export_state(), self._run.fingerprint()
        recipe, dataset_id = self._recipe, self._source.dataset_id
        if unfinished is None:
            cursors = self._source.cursors(state.step)
        else:
            recipe, dataset_id, cursors = unfinished.recipe, unfinished.dataset_id, unfinished.sources
        saving = checkpoint.begin(
            self._folder,
            state,
            recipe=recipe.model_dump(mode="json"),
            dataset_id=dataset_id,
            fingerprint=fingerprint.as_json(),
            tokens=self.tokens_read,
            position=recipe.timeline.sample(state.step),
            sources={name: cursor.model_dump(mode="json") for name, cursor in cursors.items()},
            parent=self._parent,
            kernels=dict(fingerprint.kernels),
        )
        entry = {
            "recipe": recipe,
            "dataset_id": dataset_id,
            "parent": self._parent,
            "metrics_after": self._measured_after,
            "metrics_sha256": self._measured.hexdigest(),
        }
        self._measured_after, self._measured = state.step, Digest()
        if saving.in_background:
            self._under_way = self._thread.submit(self._finish, saving, self._began_at), entry
        else:
            self._enter(self._finish(saving, self._began_at), entry)

    def _finish(self, saving: checkpoint.Saving, began_at: float) -> CheckpointInfo:
        saved = saving.finish()
        self._save_s = self._clock() - began_at
        return saved

    def needed_s(self) -> float:
        """How long a save would take that begins now, with what is left of one under way, which is finished first.
        While the first is under way, what it has taken so far is the least that another will take; before it, 0.
        """
        if self._under_way is None or self._under_way[0].done():
            return self._save_s
        taken_s = self._clock() - self._began_at
        return max(self._save_s - taken_s, 0.0) + max(self._save_s, taken_s)

    def is_due(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed since the last save began, or was tried."""
        minutes = self._recipe.checkpoint.every_minutes
        return minutes is not None and self._clock() - self._began_at >= 60 * minutes

    def problem(self, words: str) -> None:
        """Note what went wrong and does not end the run."""
        self._problems.append(words)

    def finished(self, wait: bool) -> CheckpointInfo | None:
        """The checkpoint that became durable since the last call. wait: for one under way. Raises CheckpointError."""
        self._enter_finished(wait)
        self._remove_archived(wait=False)
        finished, self._finished = self._finished, None
        return finished

    def settle(self) -> None:
        """Wait until a checkpoint that is under way is entered. Raises CheckpointError."""
        self._enter_finished(wait=True)

    def problems(self) -> tuple[str, ...]:
        """What went wrong since the last call, and does not end the run, a line each."""
        found, self._problems = tuple(self._problems), []
        return found

    def _enter_finished(self, wait: bool) -> None:
        if self._under_way is not None and (wait or self._under_way[0].done()):
            (under_way, entry), self._under_way = self._under_way, None  # a failure is raised once
            self._enter(under_way.result(), entry)

    def _enter(self, saved: CheckpointInfo, entry: dict[str, Any]) -> None:
        self._finished, self._parent = saved, saved.root
        self._metrics.event("checkpoint", step=saved.step, root=saved.root)
        self._metrics.note_checked()
        self._ledger.checkpoint(step=saved.step, root=saved.root, **entry)
        if saved.step < self._plan.last_step:
            self._ledger.chunk_begin(saved.step, self._recipe, self._source.dataset_id, saved.root)
        self._retain()

    # -- retention: archives and deletions are the thread's, and what it has to archive is removed after it has

    def _retain(self) -> None:
        """Remove what the recipe's `checkpoint.keep` does not keep any more, now that another checkpoint is entered."""
        if self._keep is None or self._archiving is not None:  # after the archiving the next save removes the rest
            return
        losses = heldout_losses(self._evaluations)
        removals = plan(self._run_folder, lineage(self._ledger.entries), self._keep, self._recipe, losses).removals
        if self._keep.archive == "none":
            self._remove(removals, {})
        elif removals:
            self._archiving = self._thread.submit(self._archive, removals), removals

    def _archive(self, removals: tuple[Removal, ...]) -> dict[int, str]:
        return {removal.step: archive(self._run_folder, removal) for removal in removals}

    def _remove_archived(self, wait: bool) -> None:
        if self._archiving is not None and (wait or self._archiving[0].done()):
            (archiving, removals), self._archiving = self._archiving, None
            try:
                self._remove(removals, archiving.result())
            except CheckpointError as error:
                self._problems.append(f"no checkpoint was removed: {error}")

    def _remove(self, removals: tuple[Removal, ...], archived: dict[int, str]) -> None:
        if self._keep is not None:
            remove(self._run_folder, self._ledger, removals, self._keep, archived, self._delete)

    def _delete(self, folder: Path) -> None:
        self._thread.submit(self._remove_tree, folder)

    def _remove_tree(self, folder: Path) -> None:
        try:
            fsops.remove_tree(folder)
        except OSError as error:  # the next start removes it
            self._problems.append(f"{folder}: cannot be removed now: {error.strerror}")
