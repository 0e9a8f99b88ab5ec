"""A run's ledger: `ledger.jsonl`, append-only, each line chained to the one before by SHA-256.

One canonical JSON object a line: `n` counts up, `previous` is the `hash` of the line before, `hash` covers all the
rest. What is in it: where the run started and went on, on which data and environment; where each chunk began and ended,
with its sample range; each checkpoint's root with a digest of the metrics up to it; skipped steps; rollbacks with the
branch that was left; changed recipes; deferred chunks. A line that was written is never changed. A resume or rollback
makes what lies beyond its step a *branch*: `lineage` tells the line that counts from those that were left, and
`Lineage.origin` tells any step's samples.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from weftrain.core.config import Recipe
from weftrain.core.errors import RunFolderError, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.plain_file import MAX_LINE_BYTES, UnreadableFileError, read_plain, torn_size
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.ledger_schema import LEDGER, check_line, read_line
from weftrain.core.run.lineage import chunk_span, lineage
from weftrain.core.run.metrics import digest

TORN = "ledger.torn"
BRANCHES = "branches"


class Ledger:
    """The ledger of the run in `folder`, opened for appending. The run's lock must be held.

    A last line that a crash tore is moved to ledger.torn, and the next line says so. Raises RunFolderError where the
    chain is broken, or the file cannot be used.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = Path(folder) / LEDGER, clock
        with self._writing():
            self._torn_bytes = _repair(self._path)
        self._entries = read_ledger(self._path)

    def _writing(self) -> AbstractContextManager[None]:
        return os_errors_as(RunFolderError, f"{self._path}: cannot be written", "make room or check it, then resume")

    @property
    def entries(self) -> Sequence[Mapping[str, Any]]:
        return self._entries

    def add(self, kind: str, *, step: int, **fields: Any) -> Mapping[str, Any]:
        """Append a line of JSON values and make it durable. Raises RunFolderError; the ledger stays whole."""
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
        line = canonical_json(entry)
        check_line(entry)
        _check_follows(entry, self._entries, line)
        try:
            with self._writing():
                fsops.append_line(self._path, line.decode(), sync=True)
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
        """Say where training begins: `start` in a new ledger, `resume` in another.

        parent: root of the checkpoint that it begins from. decided: optional keys of ledger_schema.BeginLine that say
        what else was decided; a false value is left out.
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
        """If a chunk begins at `step`, record that it begins from the checkpoint `parent`."""
        span = chunk_span(recipe, step)
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
        """Record that a chunk ends with the last line's checkpoint, if a crash came between the two lines."""
        last = self._entries[-1] if self._entries else None
        if last is not None and last["kind"] == "checkpoint":
            line = lineage(self._entries)
            if not line.segments:  # a new ledger, of which a crash left only the checkpoint that it was to begin with
                return
            segment = line.segment_of(last["step"])
            recipe = recorded_recipe(dict(segment.recipe), f"{LEDGER}:{segment.entry + 1}").recipe
            self._chunk_end(recipe, segment.dataset_id, last["step"], last["root"])

    def _chunk_end(self, recipe: Recipe, dataset_id: str, step: int, root: str) -> None:
        span = chunk_span(recipe, step - 1) if step else None
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
        core/run/own_checkpoints.py says which is.

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


class _Checked(NamedTuple):
    """What this process has checked of a ledger: its first `size` bytes, which hold `entries`."""

    path: Path
    size: int
    sha256: bytes
    entries: tuple[dict[str, Any], ...]


_checked = _Checked(Path(), 0, b"", ())  # of the ledger that was read last


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Every entry, types and chain checked; empty if there is no file. Raises RunFolderError naming the line.

    A command that reads a ledger several times checks each line once: the next reading finds, by its hash, that the
    file still begins with the same bytes. What another process checked is never taken for granted.
    """
    global _checked
    with os_errors_as(RunFolderError, f"{path}: cannot be read", "check the file and its permissions"):
        try:
            data = read_plain(path, "ledger")
        except FileNotFoundError:
            return []
        known, before = _checked, memoryview(data)[: _checked.size]
        same = known.path == path and len(before) == known.size and hashlib.sha256(before).digest() == known.sha256
        entries = list(known.entries) if same else []
        whole = data.rfind(b"\n") + 1
        with no_collection():
            for line in data[known.size if same else 0 : whole].split(b"\n")[:-1]:
                if len(line) > MAX_LINE_BYTES:
                    raise UnreadableFileError(f"has a line of more than {MAX_LINE_BYTES:,} bytes", path)
                entries.append(_parsed(path, len(entries) + 1, line, entries))
        if not same or whole > known.size:
            digest = hashlib.sha256(memoryview(data)[:whole]).digest()
            _checked = _Checked(path, whole, digest, tuple(entries))
    return entries


@contextmanager
def no_collection() -> Iterator[None]:
    """For a block that makes many objects which all stay: to look for garbage among them takes a third of its time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _parsed(path: Path, number: int, line: bytes, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    try:
        entry = read_line(line)
        _check_follows(entry, before, line)
    except ValueError as error:
        raise RunFolderError(
            f"{path}:{number}: {error}: restore the ledger from a copy; the lines after a broken one prove nothing"
        ) from error
    return entry


def _check_follows(entry: Mapping[str, Any], before: Sequence[Mapping[str, Any]], line: bytes) -> None:
    """Raises ValueError for an entry, whose canonical JSON is `line`, that may not follow `before`."""
    if entry["n"] != len(before) or entry["previous"] != (before[-1]["hash"] if before else None):
        raise ValueError("does not follow the line before it, so a line was removed, added or moved")
    # The entry's own hash is taken out of its text, which holds it once: no other key "hash" has the same value.
    own = b'"hash":"%b",' % entry["hash"].encode()
    before_it, _, after_it = line.partition(own)
    rest = before_it + after_it
    if own in after_it or len(rest) == len(line):
        rest = canonical_json({key: value for key, value in entry.items() if key != "hash"})
    if hashlib.sha256(rest).hexdigest() != entry["hash"]:
        raise ValueError("does not hash to its hash, so it was altered")


def torn_bytes(path: Path) -> int:
    """How many bytes follow the last line break: a line that a crash tore, or nothing. Raises OSError."""
    return torn_size(path, "ledger") if path.exists() else 0


def _repair(path: Path) -> int:
    """Move what follows the last line break to ledger.torn. How many bytes that was. Raises OSError."""
    if size := torn_bytes(path):
        data = read_plain(path, "ledger")
        whole, torn = data[:-size], data[-size:]
        beside = path.with_name(TORN)
        kept = read_plain(beside, "ledger") if beside.exists() else b""
        # first: a crash in between leaves it in both files, never in neither
        fsops.write_bytes(beside, kept + torn + b"\n")
        fsops.write_bytes(path, whole)
    return size
