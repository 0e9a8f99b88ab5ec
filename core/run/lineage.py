"""What a ledger says of its run."""

from __future__ import annotations

import shlex
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weftrain.core.changes import Change, restored
from weftrain.core.config import Recipe
from weftrain.core.errors import RunFolderError
from weftrain.core.order.data_section import DataConfig
from weftrain.core.order.timeline import chunk_order
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.ledger_schema import LEDGER


@dataclass(frozen=True)
class ChunkSpan:
    """A chunk of a run, as it is trained: at `place` (0-based) stands `chunk`; steps [first_step, stop_step)."""

    place: int
    chunk: int
    first_step: int
    stop_step: int

    def samples(self, recipe: Recipe) -> list[int]:
        """[first, stop) sample numbers of the run; `recipe` may have taken over within the chunk."""
        times = recipe.timeline
        return [times.sample(max(self.first_step, times.first_step)), times.sample(self.stop_step)]


def chunk_span(recipe: Recipe, step: int) -> ChunkSpan | None:
    """The chunk that the 0-based step `step` is of; None where the recipe has no chunks."""
    if recipe.data.chunks is None:
        return None
    steps = recipe.schedule.steps // recipe.data.chunks
    place = step // steps
    order = chunk_order(recipe.data, recipe.schedule.steps, recipe.batch.global_batch_size)
    return ChunkSpan(place, order.chunk_at(place), place * steps, (place + 1) * steps)


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint on the line. metrics_sha256 covers the measurements after `metrics_after` completed steps."""

    step: int
    root: str
    parent: str | None
    metrics_after: int
    metrics_sha256: str
    entry: int  # the line's number


@dataclass(frozen=True)
class TrainingSegment:
    """Steps [first_step, stop_step) with one recipe, dataset and environment. stop_step None: still open."""

    first_step: int
    stop_step: int | None
    recipe: Mapping[str, Any]
    dataset_id: str
    environment: Mapping[str, Any]
    parent: str | None
    entry: int
    parent_release: Mapping[str, Any] | None = None  # see ledger_schema.ParentRelease

    def trained_within(self, first_step: int, stop_step: int) -> bool:
        """Whether it trained any of the steps [first_step, stop_step)."""
        stop = stop_step if self.stop_step is None else min(self.stop_step, stop_step)
        return max(self.first_step, first_step) < stop

    @property
    def tokens_per_step(self) -> int:
        """Positions read by each step of this segment."""
        return int(self.recipe["batch"]["global_batch_size"]) * int(self.recipe["data"]["sequence_length"])


@dataclass(frozen=True)
class Branch:
    """What a rollback left: its number, the checkpoints on it, and where it left the line."""

    number: int
    step: int
    reason: str
    abandoned: tuple[tuple[int, str], ...]


def planned_again(recipe: Mapping[str, Any], line: Lineage) -> dict[str, Any]:
    """The recipe of a run's last start, with the changes that it had made and the run has gone back before: they are
    planned again, and their keys have the values before them.
    """
    if not line.checkpoints or not line.segments:
        return dict(recipe)
    step = line.checkpoints[-1].step
    there = line.segment_of(step).recipe
    later = [change for change in there.get("changes", ()) if change["step"] > step]
    made = [change for change in later if change not in recipe.get("changes", ())]
    if not made:
        return dict(recipe)
    return restored(recipe, there, [Change.model_validate(change) for change in made]) | {"changes": later}


@dataclass(frozen=True)
class Lineage:
    """What a ledger says, read from its start to its end."""

    checkpoints: tuple[CheckpointEntry, ...]
    segments: tuple[TrainingSegment, ...]
    branches: tuple[Branch, ...]
    decisions: tuple[Mapping[str, Any], ...]  # the `defer` entries that hold
    # ascending: completed steps after each that was left out, for its loss or gradient was not finite
    skips: tuple[int, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)  # that it told last, as it was written
    # roots of checkpoints whose states were removed (core/run/retention.py), and not made again since
    removed: frozenset[str] = frozenset()
    # completed steps and set of each score that is entered -> hash of what it says
    scores: Mapping[tuple[int, str], str] = field(default_factory=dict)
    ended: float = 0.0  # when its last line was written, in seconds since 1970

    def segment_at(self, step: int) -> TrainingSegment:
        """The segment that made the 0-based step `step`. Raises ValueError for a step that the ledger does not have."""
        place = bisect_right(self.segments, step, key=lambda segment: segment.first_step) - 1
        segment = self.segments[place] if place >= 0 else None
        if segment is None or (segment.stop_step is not None and step >= segment.stop_step):
            raise ValueError(f"step {step} is not in the ledger")
        return segment

    def segment_of(self, completed: int) -> TrainingSegment:
        """The segment that made a checkpoint of so many completed steps, also where a later one has begun right there;
        the first one, of the state that it began with.

        Raises ValueError for one that the ledger does not have.
        """
        began = not completed or (self.segments and completed == self.segments[0].first_step)
        return self.segments[0] if began else self.segment_at(completed - 1)

    def origin(self, step: int) -> tuple[TrainingSegment, list[int], ChunkSpan | None]:
        """How the 0-based step `step` was made, on the line that counts: its segment, its samples [first, stop), its
        chunk.

        The samples' rows follow from recipe and dataset alone (core/data.py). Raises ValueError for a step that the
        ledger does not have.
        """
        segment = self.segment_at(step)
        recipe = recorded_recipe(dict(segment.recipe), f"{LEDGER}:{segment.entry + 1}").recipe
        times = recipe.timeline
        return segment, [times.sample(step), times.sample(step + 1)], chunk_span(recipe, step)

    def tokens_read(self, step: int) -> int:
        """Positions read in the first `step` steps: each step by its own segment's recipe, what lies before the first
        segment by that one.

        0 where the ledger has no segment.
        """
        if not self.segments:
            return 0
        starts = [segment.first_step for segment in self.segments]
        edges = [0, *starts[1:], max(step, starts[-1])]
        parts = zip(self.segments, edges, edges[1:], strict=False)
        return sum(segment.tokens_per_step * max(0, min(step, stop) - first) for segment, first, stop in parts)


def tokens_before(step: int, manifest: Mapping[str, Any] | None, line: Lineage) -> int:
    """Positions read before `step`, where a run starts: its checkpoint's count, and by the ledger those of the steps
    since.

    manifest: of the checkpoint of this run that it resumes from, or None. A backend that keeps its own state may stand
    beyond it.
    """
    if manifest is None:
        return line.tokens_read(step)
    return int(manifest["tokens"]) + line.tokens_read(step) - line.tokens_read(manifest["step"])


def lineage(entries: Sequence[Mapping[str, Any]]) -> Lineage:
    """Follow a ledger. Raises RunFolderError if it contradicts itself: a resume from a checkpoint it does not list.

    A long one that was followed before is followed from where it ended then: a line's hash stands for all before it.
    """
    try:
        count, head, line = _followed.pop()  # of which no other thread has then the lists
        if not count <= len(entries) or entries[count - 1].get("hash") != head:
            raise IndexError
    except IndexError:
        count, line = 0, _Line()
    for entry in entries[count:]:
        getattr(line, f"on_{entry['kind']}", line.on_other)(entry)
    if len(entries) >= _LONG and "hash" in entries[-1]:
        _followed[:] = [(len(entries), str(entries[-1]["hash"]), line)]
    return Lineage(
        tuple(line.checkpoints),
        tuple(line.segments),
        tuple(line.branches),
        tuple(line.decisions),
        tuple(line.skips),
        line.recipe,
        frozenset(line.removed),
        dict(line.scores),
        float(entries[-1].get("time", 0.0)) if entries else 0.0,
    )


@dataclass
class _Line:
    checkpoints: list[CheckpointEntry] = field(default_factory=list)
    segments: list[TrainingSegment] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    decisions: list[Mapping[str, Any]] = field(default_factory=list)
    skips: list[int] = field(default_factory=list)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    scores: dict[tuple[int, str], str] = field(default_factory=dict)

    def on_start(self, entry: Mapping[str, Any]) -> None:
        if self.segments:
            raise RunFolderError(
                f"{LEDGER}:{entry['n'] + 1}: starts a run that was started before: two ledgers were put together"
            )
        self.recipe = entry["recipe"]
        self._go_on(entry)

    def on_recipe(self, entry: Mapping[str, Any]) -> None:
        self.recipe = entry["recipe"]

    def on_resume(self, entry: Mapping[str, Any]) -> None:
        step, root = entry["step"], entry["parent"]
        self._cut(-1 if entry.get("from_scratch") else step)
        if self.checkpoints and self.checkpoints[-1].root != root and (root is not None or step > 0):
            raise RunFolderError(
                f"{LEDGER}:{entry['n'] + 1}: resumes from checkpoint {str(root)[:12]}, and the last before it is "
                "another: was the ledger "
                "of another run put here?"
            )
        self._go_on(entry)

    def on_checkpoint(self, entry: Mapping[str, Any]) -> None:
        while self.checkpoints and self.checkpoints[-1].step >= entry["step"]:
            self.checkpoints.pop()
        self.removed.discard(entry["root"])
        after, digest = entry["metrics_after"], entry["metrics_sha256"]
        self.checkpoints.append(
            CheckpointEntry(entry["step"], entry["root"], entry["parent"], after, digest, entry["n"])
        )

    def on_rollback(self, entry: Mapping[str, Any]) -> None:
        abandoned = tuple((step, root) for step, root in entry["abandoned"])
        self.branches.append(Branch(entry["branch"], entry["step"], entry["reason"], abandoned))
        self._cut(entry["step"])

    def on_defer(self, entry: Mapping[str, Any]) -> None:
        self.decisions.append(entry)

    def on_skip(self, entry: Mapping[str, Any]) -> None:
        while self.skips and self.skips[-1] >= entry["step"]:
            self.skips.pop()
        self.skips.append(entry["step"])

    def on_remove(self, entry: Mapping[str, Any]) -> None:
        self.removed.update(root for _, root, _ in entry["removed"])

    def on_evaluation(self, entry: Mapping[str, Any]) -> None:
        self.scores[entry["step"], entry["set"]] = entry["sha256"]

    def on_end(self, entry: Mapping[str, Any]) -> None:
        if self.segments:
            self.segments[-1] = _until(self.segments[-1], entry["step"])

    def on_other(self, entry: Mapping[str, Any]) -> None:
        pass

    def _cut(self, step: int) -> None:
        """Remove what lies beyond `step` from the ends of the lists, whose steps ascend."""
        self.scores = {place: sha256 for place, sha256 in self.scores.items() if place[0] <= step}
        while self.skips and self.skips[-1] > step:
            self.skips.pop()
        while self.checkpoints and self.checkpoints[-1].step > step:
            self.checkpoints.pop()
        while self.segments and self.segments[-1].first_step >= step:
            self.segments.pop()
        if self.segments:
            self.segments[-1] = _until(self.segments[-1], step)

    def _go_on(self, entry: Mapping[str, Any]) -> None:
        if self.segments:
            self.segments[-1] = _until(self.segments[-1], entry["step"])
        where = (entry["dataset_id"], entry["environment"], entry["parent"], entry["n"], entry.get("parent_release"))
        self.segments.append(TrainingSegment(entry["step"], None, self.recipe, *where))


def _until(segment: TrainingSegment, step: int) -> TrainingSegment:
    stop = step if segment.stop_step is None else min(step, segment.stop_step)
    return replace(segment, stop_step=stop)


_LONG = 1000  # lines; a shorter ledger is followed in a millisecond
_followed: list[tuple[int, str, _Line]] = []  # at most one: lines, hash of the last one, and where they led


def going_back(step: int, run: str = "RUN") -> str:
    """How one goes back to `step`, in words. No run has a checkpoint of its beginning to go back to."""
    if step == 0:
        return "begin another run, with another --run"
    return f"go back first, with `weftrain rollback {shlex.quote(run)} --to {step} --reason WHY`"


def with_decisions(data: DataConfig, decisions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """data.skip with the chunks that the ledger defers or drops, each once, as JSON values."""
    skip = [entry.model_dump(mode="json") for entry in data.skip]
    named = {entry["chunk"] for entry in skip if entry["chunk"] is not None}
    for entry in decisions:
        if entry["chunk"] not in named:
            found = {
                "reason": entry["reason"],
                "chunk": entry["chunk"],
                "action": entry["action"],
                "source": None,
                "rows": None,
            }
            skip.append(found)
    return skip
