"""A run's ledger: `ledger.jsonl`, append-only, each line chained to the one before by SHA-256.

One canonical JSON object a line: `n` counts up, `previous` is the `hash` of the line before, `hash` covers all the
rest. What is in it: where the run started and went on, on which data and environment; where each chunk began and ended,
with its sample range; each checkpoint's root with a digest of the metrics up to it; skipped steps; rollbacks with the
branch that was left; changed recipes; deferred chunks. What a reader would get wrong: a line that was written is never
changed. A resume or rollback makes what lies beyond its step a *branch*: `lineage` tells the line that counts from
those that were left, and `Lineage.origin` tells any step's samples.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from weftrain.core.config import DataConfig, Recipe
from weftrain.core.errors import RunFolderError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.plain_file import plain_lines, read_plain
from weftrain.core.order.rows import chunk_order, recipe_timeline
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.ledger_lines import check_line
from weftrain.core.run.metrics import digest

LEDGER = "ledger.jsonl"
TORN = "ledger.torn"
BRANCHES = "branches"


@dataclass(frozen=True)
class Span:
    """A chunk of a run, as it is trained: at `place` (0-based) stands `chunk`; steps [first_step, stop_step)."""

    place: int
    chunk: int
    first_step: int
    stop_step: int

    def samples(self, recipe: Recipe) -> list[int]:
        """[first, stop) sample numbers of the run; the first that `recipe` reads where it took over within the
        chunk.
        """
        times = recipe_timeline(recipe)
        return [times.sample(max(self.first_step, times.first_step)), times.sample(self.stop_step)]


def span_of(recipe: Recipe, step: int) -> Span | None:
    """The chunk that the 0-based step `step` is of; None where the recipe has no chunks."""
    if recipe.data.chunks is None:
        return None
    steps = recipe.schedule.steps // recipe.data.chunks
    place = step // steps
    order = chunk_order(recipe.data, recipe.schedule.steps, recipe.batch.global_batch_size)
    return Span(place, order.chunk_at(place), place * steps, (place + 1) * steps)


class Ledger:
    """The ledger of the run in `folder`, opened for appending. The run's lock must be held.

    A last line that a crash tore is moved to ledger.torn, and the next line says so. Raises RunFolderError where the
    chain is broken, or the file cannot be used.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = Path(folder) / LEDGER, clock
        with _blamed(self._path):
            self._torn_bytes = _repair(self._path)
        self._entries = read_ledger(self._path)

    @property
    def entries(self) -> Sequence[Mapping[str, Any]]:
        return self._entries

    def add(self, kind: str, *, step: int, **fields: Any) -> Mapping[str, Any]:
        """Append a line and make it durable. Fields are JSON values. Raises RunFolderError; then the ledger is whole
        all the same.
        """
        torn = {"torn_bytes": self._torn_bytes} if self._torn_bytes else {}
        entry = {
            "n": len(self._entries),
            "previous": self._entries[-1]["hash"] if self._entries else None,
            "time": self._clock(),
            "kind": kind,
            "step": step,
            **fields,
            **torn,
        }
        entry = parse_json(canonical_json(entry))  # as it will read back
        entry["hash"] = sha256_json(entry)
        _check_entry(entry, self._entries)
        try:
            with _blamed(self._path):
                fsops.append_line(self._path, canonical_json(entry).decode(), sync=True)
                if not self._entries:
                    fsops.sync_dir(self._path.parent)
        except RunFolderError:
            self._entries = read_ledger(self._path)  # where only the sync failed, the line is there
            raise
        self._torn_bytes = 0
        self._entries.append(entry)
        return entry

    def open_run(
        self,
        step: int,
        recipe: dict[str, Any],
        dataset_id: str,
        environment: dict[str, Any],
        parent: str | None,
        **decided: Any,
    ) -> None:
        """Say where training begins: `start` in a new ledger, `resume` in another. parent: root of the checkpoint it
        begins from.

        decided: optional keys of such a line (ledger_lines.Begin) that say what else was decided; a false value is left
        out.
        """
        where = {
            "recipe_sha256": sha256_json(recipe),
            "dataset_id": dataset_id,
            "environment": environment,
            "parent": parent,
        }
        where |= {key: value for key, value in decided.items() if value}
        if any(entry["kind"] == "start" for entry in self._entries):
            # or no verb could read it again
            lineage([*self._entries, {"kind": "resume", "n": len(self._entries), "step": step, **where}])
            self.add("resume", step=step, **where)
        else:
            self.add("start", step=step, recipe=recipe, **where)

    def chunk_begin(self, step: int, recipe: Recipe, dataset_id: str, parent: str | None) -> None:
        """Say that the chunk which begins at `step` begins from the checkpoint `parent`; nothing where none begins
        there.
        """
        span = span_of(recipe, step)
        if span is not None and span.first_step == step:
            where = {"chunk": span.chunk, "place": span.place, "samples": span.samples(recipe)}
            self.add("chunk_begin", step=step, dataset_id=dataset_id, parent=parent, **where)

    def checkpoint(
        self,
        recipe: Recipe,
        dataset_id: str,
        *,
        step: int,
        root: str,
        parent: str | None,
        metrics_after: int,
        metrics_sha256: str,
        **entered: Any,
    ) -> None:
        """A checkpoint is durable; and where a chunk ends with it, that this chunk was trained up to it."""
        self.add(
            "checkpoint",
            step=step,
            root=root,
            parent=parent,
            metrics_after=metrics_after,
            metrics_sha256=metrics_sha256,
            **entered,
        )
        self._chunk_end(recipe, dataset_id, step, root)

    def finish_chunk(self) -> None:
        """Say that a chunk ends with the checkpoint in the ledger's last line, where a crash came between the two
        lines.
        """
        last = self._entries[-1] if self._entries else None
        if last is not None and last["kind"] == "checkpoint":
            line = lineage(self._entries)
            if not line.segments:  # a new ledger, of which a crash left only the checkpoint that it was to begin with
                return
            segment = line.segment_of(last["step"])
            recipe = recorded_recipe(dict(segment.recipe), f"{LEDGER}:{segment.entry + 1}").recipe
            self._chunk_end(recipe, segment.dataset_id, last["step"], last["root"])

    def _chunk_end(self, recipe: Recipe, dataset_id: str, step: int, root: str) -> None:
        span = span_of(recipe, step - 1) if step else None
        if span is not None and span.stop_step == step:
            first, stop = span.samples(recipe)
            begun = [
                entry for entry in self._entries if entry["kind"] == "chunk_begin" and entry["step"] == span.first_step
            ]
            where = {
                "chunk": span.chunk,
                "place": span.place,
                "samples": [begun[-1]["samples"][0] if begun else first, stop],
            }
            self.add("chunk_end", step=step, dataset_id=dataset_id, root=root, **where)

    def adopt(
        self,
        manifest: Mapping[str, Any],
        records: Iterable[Mapping[str, Any]],
        how: Literal["resume", "repair"] = "resume",
    ) -> None:
        """Enter the run's own checkpoint that a crash left out, between its rename and its line here;
        core/run/adoption.py says which is.

        records: the run's measurements, as `metrics.effective_records` gives them before the resume.
        """
        points = lineage(self._entries).checkpoints
        if any(point.root == manifest["root"] for point in points):
            return
        step, after = (
            manifest["step"],
            max((point.step for point in points if point.step < manifest["step"]), default=0),
        )
        measured = (
            record for record in records if record["kind"] in ("step", "evaluation") and after < record["step"] <= step
        )
        self.checkpoint(
            recorded_recipe(manifest["recipe"], f"checkpoint of step {step}").recipe,
            manifest["dataset_id"],
            step=step,
            root=manifest["root"],
            parent=manifest["parent"],
            metrics_after=after,
            metrics_sha256=digest(measured),
            entered=how,
        )


@dataclass(frozen=True)
class Point:
    """A checkpoint on a line. metrics_after: completed steps after which the measurements begin that metrics_sha256
    covers.
    """

    step: int
    root: str
    parent: str | None
    metrics_after: int
    metrics_sha256: str
    entry: int  # the line's number


@dataclass(frozen=True)
class TrainingSegment:
    """Steps trained in one go, [first_step, stop_step): by one recipe, on one dataset, in one environment. stop_step
    None: so far.
    """

    first_step: int
    stop_step: int | None
    recipe: Mapping[str, Any]
    dataset_id: str
    environment: Mapping[str, Any]
    parent: str | None
    entry: int

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


@dataclass(frozen=True)
class Lineage:
    """What a ledger says, read from its start to its end."""

    checkpoints: tuple[Point, ...]
    segments: tuple[TrainingSegment, ...]
    branches: tuple[Branch, ...]
    decisions: tuple[Mapping[str, Any], ...]  # the `defer` entries that hold
    # ascending: completed steps after each that was left out, for its loss or gradient was not finite
    skips: tuple[int, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)  # that it told last, as it was written

    def segment_at(self, step: int) -> TrainingSegment:
        """The segment in which the 0-based step `step` was made. Raises ValueError for a step that the ledger does not
        have.
        """
        place = bisect_right(self.segments, step, key=lambda segment: segment.first_step) - 1
        segment = self.segments[place] if place >= 0 else None
        if segment is None or (segment.stop_step is not None and step >= segment.stop_step):
            raise ValueError(f"step {step} is not in the ledger")
        return segment

    def segment_of(self, completed: int) -> TrainingSegment:
        """The segment that made a checkpoint of so many completed steps, also where a later one has begun right there.

        Raises ValueError for one that the ledger does not have.
        """
        return self.segment_at(completed - 1) if completed else self.segments[0]

    def origin(self, step: int) -> tuple[TrainingSegment, list[int], Span | None]:
        """How the 0-based step `step` was made, on the line that counts: its segment, its samples [first, stop), its
        chunk.

        The samples' rows follow from recipe and dataset alone (core/data.py). Raises ValueError for a step that the
        ledger does not have.
        """
        segment = self.segment_at(step)
        recipe = recorded_recipe(dict(segment.recipe), f"{LEDGER}:{segment.entry + 1}").recipe
        times = recipe_timeline(recipe)
        return segment, [times.sample(step), times.sample(step + 1)], span_of(recipe, step)

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
    """Follow a ledger. Raises RunFolderError for one that contradicts itself: a resume from a checkpoint that it does
    not have.
    """
    line = _Line()
    for entry in entries:
        getattr(line, f"on_{entry['kind']}", line.on_other)(entry)
    return Lineage(
        tuple(line.checkpoints),
        tuple(line.segments),
        tuple(line.branches),
        tuple(line.decisions),
        tuple(line.skips),
        line.recipe,
    )


@dataclass
class _Line:
    checkpoints: list[Point] = field(default_factory=list)
    segments: list[TrainingSegment] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    decisions: list[Mapping[str, Any]] = field(default_factory=list)
    skips: list[int] = field(default_factory=list)
    recipe: Mapping[str, Any] = field(default_factory=dict)

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
        after, digest = entry["metrics_after"], entry["metrics_sha256"]
        self.checkpoints.append(Point(entry["step"], entry["root"], entry["parent"], after, digest, entry["n"]))

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

    def on_end(self, entry: Mapping[str, Any]) -> None:
        if self.segments:
            self.segments[-1] = _until(self.segments[-1], entry["step"])

    def on_other(self, entry: Mapping[str, Any]) -> None:
        pass

    def _cut(self, step: int) -> None:
        """Take what lies beyond `step` off the ends of the lists, whose steps ascend: each entry is added and removed
        once.
        """
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
        where = (entry["dataset_id"], entry["environment"], entry["parent"], entry["n"])
        self.segments.append(TrainingSegment(entry["step"], None, self.recipe, *where))


def _until(segment: TrainingSegment, step: int) -> TrainingSegment:
    stop = step if segment.stop_step is None else min(step, segment.stop_step)
    return TrainingSegment(
        segment.first_step, stop, segment.recipe, segment.dataset_id, segment.environment, segment.parent, segment.entry
    )


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


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Every entry of a ledger, its types and the chain checked. Empty where there is no file. Raises RunFolderError
    naming the line.
    """
    entries: list[dict[str, Any]] = []
    try:
        for number, line in enumerate(plain_lines(path, "ledger"), 1):
            try:
                entry = parse_json(line)
                if canonical_json(entry) != line:
                    raise ValueError("is not in canonical form, so it was altered")
                _check_entry(entry, entries)
            except ValueError as error:
                raise RunFolderError(
                    f"{path}:{number}: {error}: restore the ledger from a copy; what follows a broken line proves "
                    "nothing"
                ) from error
            entries.append(entry)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}: check the file and its permissions") from error
    return entries


def _check_entry(entry: Any, before: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for an entry that may not follow `before`."""
    check_line(entry)
    if entry["n"] != len(before) or entry["previous"] != (before[-1]["hash"] if before else None):
        raise ValueError("does not follow the line before it, so a line was removed, added or moved")
    if sha256_json({key: value for key, value in entry.items() if key != "hash"}) != entry["hash"]:
        raise ValueError("does not hash to its hash, so it was altered")


def torn_bytes(path: Path) -> int:
    """How many bytes follow the last line break: a line that a crash tore, or nothing. Raises OSError."""
    return len(read_plain(path, "ledger").rpartition(b"\n")[2]) if path.exists() else 0


def _repair(path: Path) -> int:
    """Move what follows the last line break to ledger.torn. How many bytes that was. Raises OSError."""
    if not path.exists():
        return 0
    data = read_plain(path, "ledger")
    whole, torn = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
    if torn:
        beside = path.with_name(TORN)
        kept = read_plain(beside, "ledger") if beside.exists() else b""
        # first: a crash in between leaves it in both files, never in neither
        fsops.write_bytes(beside, kept + torn + b"\n")
        fsops.write_bytes(path, whole)
    return len(torn)


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written: {error.strerror or error}: make room or check it, then resume"
        ) from error
