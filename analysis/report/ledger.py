"""A ledger's lines as a page shows them: marks on the step axis, chunks, checkpoints, starts, and each line in words.

A line counts until a later rollback or resume returns to an earlier step; what lies beyond is abandoned, but still
shown. `read_ledger` has checked the chain and every field's type; a recorded recipe or environment may hold anything.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.run.ledger import BRANCHES

Entry = Mapping[str, Any]
MARKED = {"resume": "restart", "rollback": "rollback", "skip": "skip", "recipe": "recipe", "defer": "defer"}


@dataclass(frozen=True)
class Mark:
    """An event after a completed step. kind: a value of MARKED. abandoned: on a branch that does not count."""

    step: int
    kind: str
    words: str
    abandoned: bool = False


@dataclass(frozen=True)
class Band:
    """An effective chunk on the step axis: completed steps first_step to stop_step."""

    chunk: int
    first_step: int
    stop_step: int
    words: str


@dataclass(frozen=True)
class SavedCheckpoint:
    """A recorded checkpoint. samples: [first, stop) since its parent, None where the batch size is unknown.

    place: its folder relative to the run, None where it is gone. abandoned: why it does not count.
    """

    step: int
    first_step: int
    samples: tuple[int, int] | None
    chunk: str
    root: str
    parent: str | None
    metrics_sha256: str
    place: str | None
    abandoned: str | None


@dataclass(frozen=True)
class RunStart:
    """A start or resume: it reached `reached`; steps [first_step, kept] count. facts: environment, recipe, dataset."""

    number: int
    first_step: int
    kept: int
    reached: int
    when: str
    parent: str | None
    facts: Mapping[str, str]


@dataclass(frozen=True)
class LedgerLine:
    """One line of the ledger in words."""

    number: int
    step: int
    kind: str
    when: str
    words: str
    abandoned: bool


def left_flags(entries: Sequence[Entry]) -> list[bool]:
    """For each entry, whether a later rollback or resume went behind its step. What was decided always stands: a
    rollback, a chunk put off, a changed recipe, a removal.
    """
    flags, lowest = [False] * len(entries), None
    for index in range(len(entries) - 1, -1, -1):
        entry = entries[index]
        stands = entry["kind"] in ("rollback", "defer", "recipe", "remove", "alert")
        flags[index] = not stands and lowest is not None and _behind(entry) > lowest
        if entry["kind"] in ("rollback", "resume"):
            lowest = entry["step"] if lowest is None else min(lowest, entry["step"])
    return flags


def _behind(entry: Entry) -> float:
    """A line about the steps that follow it (a chunk that begins, a start) is abandoned together with them."""
    return entry["step"] + (0.5 if entry["kind"] in ("chunk_begin", "start", "resume") else 0)


def marks(entries: Sequence[Entry]) -> list[Mark]:
    return [
        Mark(entry["step"], MARKED[entry["kind"]], words(entry), left)
        for entry, left in zip(entries, left_flags(entries), strict=True)
        if entry["kind"] in MARKED
    ]


def bands(entries: Sequence[Entry]) -> list[Band]:
    """The effective chunks that were trained to their ends."""
    begins: dict[int, int] = {}
    found: dict[int, Band] = {}
    for entry, left in zip(entries, left_flags(entries), strict=True):
        if left:
            continue
        if entry["kind"] == "chunk_begin":
            begins[entry["place"]] = entry["step"]
        elif entry["kind"] == "chunk_end" and entry["place"] in begins:
            first = begins[entry["place"]]
            found[first] = Band(
                entry["chunk"], first, entry["step"], f"chunk {entry['chunk']}, {_samples(entry['samples'])}"
            )
    return [found[first] for first in sorted(found) if found[first].stop_step > first]


def saved_checkpoints(entries: Sequence[Entry], run: Path) -> list[SavedCheckpoint]:
    """Every checkpoint in the ledger's order, abandoned ones included."""
    abandoned = {
        root: (entry["branch"], entry["reason"])
        for entry in entries
        if entry["kind"] == "rollback"
        for _, root in entry["abandoned"]
    }
    steps = {entry["root"]: entry["step"] for entry in entries if entry["kind"] == "checkpoint"}
    ends = {entry["root"]: entry for entry in entries if entry["kind"] == "chunk_end"}
    begins, found = list[Entry](), []
    numbered: Callable[[int], int] | None = None
    stops: dict[str, int] = {}  # root -> number of the sample that comes next
    folders = _Folders(run)
    for entry, left in zip(entries, left_flags(entries), strict=True):
        if entry["kind"] in ("start", "recipe"):
            numbered = _numbered(entry["recipe"])
        elif entry["kind"] == "chunk_begin":
            begins.append(entry)
        elif entry["kind"] in ("resume", "rollback"):
            while begins and begins[-1]["step"] >= entry["step"]:
                begins.pop()  # one that begins there is entered again
        elif entry["kind"] == "checkpoint":
            step, root, parent = entry["step"], entry["root"], entry["parent"]
            first = min(steps.get(parent or "", 0), step)
            end = ends.get(root)
            source = end or (begins[-1] if begins else None)
            chunk = "" if source is None else str(source["chunk"]) + ("" if end else ", in part")
            branch, reason = abandoned.get(root, (None, None))
            why = (
                None
                if not left
                else "made again after a restart"
                if branch is None
                else f"abandoned on branch {branch}: {reason}"
            )
            samples = None
            if numbered is not None:
                stops[root] = numbered(step)
                samples = (stops.get(parent or "", min(numbered(first), stops[root])), stops[root])
            place = folders.place(step, branch if left else None)
            found.append(
                SavedCheckpoint(step, first, samples, chunk, root, parent, entry["metrics_sha256"], place, why)
            )
    return found


class _Folders:
    """Where a run's checkpoints lie. Each folder of checkpoints is listed once."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._listed: dict[str, frozenset[str]] = {}

    def place(self, step: int, branch: int | None) -> str | None:
        """Relative to the run; None where it is gone. `weftrain verify` checks that it is the one of its root."""
        above, name = "checkpoints" if branch is None else f"{BRANCHES}/{branch}", folder_name(step)
        if above not in self._listed:
            self._listed[above] = _folders_in(self._run / above)
        return f"{above}/{name}" if name in self._listed[above] else None


def _folders_in(path: Path) -> frozenset[str]:
    try:
        with os.scandir(path) as found:
            return frozenset(entry.name for entry in found if entry.is_dir())
    except OSError:
        return frozenset()


def _numbered(recipe: Any) -> Callable[[int], int] | None:
    """Step -> number of its first sample in the run, from where this recipe took over; None if not recorded."""
    try:
        batch = recipe["batch"]["global_batch_size"]
        origin = recipe["data"].get("continues") or {"step": 0, "sample": 0}
        step, sample = origin["step"], origin["sample"]
        return lambda asked: max(0, int(sample) + (asked - int(step)) * int(batch))
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def run_starts(entries: Sequence[Entry], measured: Sequence[int]) -> list[RunStart]:
    """Every start and resume. measured: for each, the completed steps that its metrics reached, -1 for none."""
    starts = [index for index, entry in enumerate(entries) if entry["kind"] in ("start", "resume")]
    lowest = _lowest_later(entries)
    found = []
    for number, index in enumerate(starts, 1):
        entry, stop = entries[index], starts[number] if number < len(starts) else len(entries)
        first = entry["step"]
        saved_at = (other["step"] for other in entries[index:stop] if other["kind"] in ("checkpoint", "skip", "end"))
        reached = max([first, measured[number - 1], *saved_at])
        kept = max(first, min(reached, lowest[index]))
        found.append(RunStart(number, first, kept, reached, when(entry), entry["parent"], _facts(entry)))
    return found


def _lowest_later(entries: Sequence[Entry]) -> list[float]:
    """For each entry, the lowest step that a later rollback or resume returns to."""
    found, lowest = [math.inf] * len(entries), math.inf
    for index in range(len(entries) - 1, -1, -1):
        found[index] = lowest
        if entries[index]["kind"] in ("rollback", "resume"):
            lowest = min(lowest, entries[index]["step"])
    return found


def _facts(entry: Entry) -> dict[str, str]:
    """The environment as dotted keys; of the kernels only each op's source."""
    environment = dict(entry["environment"])
    kernels = environment.pop("kernels", None)
    found = dict(_flat("", environment))
    ops = kernels.get("ops") if isinstance(kernels, Mapping) else None
    for op, choices in sorted(ops.items()) if isinstance(ops, Mapping) else ():
        sources = (
            {str(choice.get("source")) for choice in choices if isinstance(choice, Mapping)}
            if isinstance(choices, list)
            else set()
        )
        found[f"kernel {op}"] = ", ".join(sorted(sources)) or "-"
    return {**found, "recipe": entry["recipe_sha256"][:12], "dataset": entry["dataset_id"][:12]}


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in sorted(value.items()):
            yield from _flat(f"{key}.{name}" if key else name, item)
    else:
        yield key, value if isinstance(value, str) else canonical_json(value).decode()


class LedgerLines(Sequence[LedgerLine]):
    """The ledger's lines in words, each made when it is asked for: of a long ledger few are shown."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries, self._left = entries, left_flags(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, place: int) -> LedgerLine: ...

    @overload
    def __getitem__(self, place: slice) -> list[LedgerLine]: ...

    def __getitem__(self, place: int | slice) -> LedgerLine | list[LedgerLine]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        entry = self._entries[place]
        return LedgerLine(place % len(self), entry["step"], entry["kind"], when(entry), words(entry), self._left[place])


def words(entry: Entry) -> str:
    """A line in words, without its step and time."""
    kind = entry["kind"]
    if kind in ("start", "resume"):
        where = entry["environment"]
        origin = "from scratch" if entry["parent"] is None else f"from checkpoint {entry['parent'][:12]}"
        return (
            f"{'started' if kind == 'start' else 'restarted'} {origin}, {where.get('backend', '?')} on "
            f"{where.get('device', '?')}"
        )
    if kind in ("chunk_begin", "chunk_end"):
        return (
            f"chunk {entry['chunk']} {kind.removeprefix('chunk_')}s, place {entry['place']}, "
            f"{_samples(entry['samples'])}"
        )
    if kind == "checkpoint":
        return f"checkpoint {entry['root'][:12]}, metrics {entry['metrics_sha256'][:12]}"
    if kind == "recipe":
        return "recipe changed: " + ", ".join(
            f"{key}: {_shown(old)} → {_shown(new)}" for key, old, new in entry["changes"]
        )
    if kind == "rollback":
        count = len(entry["abandoned"])
        later = f"{count} later checkpoint{'' if count == 1 else 's'} on branch {entry['branch']}"
        return f"rolled back to checkpoint {entry['root'][:12]}, {later}: {entry['reason']}"
    if kind == "alert":
        return f"alert {entry['words']}"
    if kind == "defer":
        return f"chunk {entry['chunk']} {'deferred' if entry['action'] == 'defer' else 'dropped'}: {entry['reason']}"
    if kind == "remove":
        count = len(entry["removed"])
        kept = sum(archive is not None for *_, archive in entry["removed"])
        return f"{count} checkpoint{'' if count == 1 else 's'} removed" + (
            f", weights of {kept} archived" if kept else ""
        )
    if kind == "evaluation":
        of = "" if entry.get("checkpoint") is None else f" of checkpoint {entry['checkpoint'][:12]}"
        return f"score {entry['set']}{of}, {entry['sha256'][:12]}"
    if kind == "skip":
        return f"step skipped, {_samples(entry['samples'])}"
    return "ended"


def _shown(value: Any) -> str:
    return "(absent)" if value is None else canonical_json(value).decode()


def _samples(samples: Sequence[int]) -> str:
    return f"samples {samples[0]:,} to {samples[1] - 1:,}"


def when(entry: Entry) -> str:
    """UTC, to the second."""
    return datetime.datetime.fromtimestamp(entry["time"], datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def whole(value: Any) -> int | None:
    """A count as it is; None for anything else."""
    return value if type(value) is int and 0 <= value < 1 << 80 else None


def text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
