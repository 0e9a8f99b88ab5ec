"""The runs in a folder, each in one line: its state, how far it is, its last loss, when it last wrote.

`list_runs(folder)` reads the ends of the files alone, so that a folder of long runs is listed at once. It verifies
nothing: `weftrain log` checks a ledger's chain, and `weftrain eval` a checkpoint's bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weftrain.core.errors import WeftrainError
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import open_plain
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.run_folder import LOCK, RECIPE, stored_recipe

State = Literal["running", "complete", "stopped", "started", "unreadable"]
_TAIL_BYTES = 1 << 18  # holds some hundred lines of metrics


@dataclass(frozen=True)
class ListedRun:
    """One run. step counts completed steps; loss is the last logged training loss; active_s is in seconds since 1970.

    state: running (a process of this machine holds its lock), complete, stopped (it resumes with the same command),
    started (no step is logged yet), unreadable (`problem` says why).
    """

    name: str
    state: State
    step: int = 0
    steps: int | None = None  # that the recipe trains
    loss: float | None = None
    backend: str | None = None
    active_s: float | None = None
    problem: str | None = None


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs in `folder`, the one that wrote last first. Raises OSError where the folder cannot be listed."""
    held = held_locks()
    runs = [_listed(path, held) for path in sorted(folder.iterdir()) if (path / RECIPE).is_file()]
    return sorted(runs, key=lambda run: -(run.active_s or 0.0))


def _listed(path: Path, held: set[tuple[int, int, int]]) -> ListedRun:
    written = [(path / name).stat().st_mtime for name in (METRICS, LEDGER, RECIPE) if (path / name).is_file()]
    active_s = max(written)
    try:
        recipe = stored_recipe(path) or {}
        steps = int(recipe["schedule"]["steps"])
        backend = str(recipe["backend"]["name"])
        last = next(_from_the_end(path / METRICS, "step"), None)
        events = next(_from_the_end(path / LEDGER, None), {})
    except (WeftrainError, OSError, KeyError, TypeError, ValueError) as error:
        return ListedRun(path.name, "unreadable", active_s=active_s, problem=str(error))
    step = 0 if last is None else int(last["step"])
    loss = None if last is None or not isinstance(last.get("loss"), int | float) else float(last["loss"])
    state: State = "started" if last is None else "stopped"
    if events.get("kind") == "end" or step >= steps:
        state, step = "complete", max(step, int(events.get("step", step)))
    if lock_identity(path / LOCK) in held:
        state = "running"
    return ListedRun(path.name, state, step, steps, loss, backend, active_s)


def _from_the_end(path: Path, kind: str | None) -> Iterator[dict[str, Any]]:
    """The whole lines in a file's last _TAIL_BYTES of one kind (None: any), last first; a damaged line is left out."""
    if not path.is_file():
        return
    with open_plain(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read(_TAIL_BYTES).split(b"\n")
    for line in reversed(lines[0 if size <= _TAIL_BYTES else 1 : -1]):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and kind in (None, record.get("kind")):
            yield record


def lock_identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return os.major(found.st_dev), os.minor(found.st_dev), found.st_ino


def held_locks() -> set[tuple[int, int, int]]:
    """Device and inode of every file that a process of this machine holds a flock on. To try the lock instead would
    refuse a run that starts at that moment.
    """
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    held = set()
    for fields in (line.split() for line in lines):
        if len(fields) > 5 and fields[1] == "FLOCK":
            major, minor, inode = fields[5].split(":")
            held.add((int(major, 16), int(minor, 16), int(inode)))
    return held
