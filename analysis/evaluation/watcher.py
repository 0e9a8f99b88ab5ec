"""Follows a run and evaluates its checkpoints as they appear, each once, the oldest first, until the run has ended.

What a reader would get wrong: nothing is remembered on disk here. What is done is what `evaluate` finds done, since a
record appears whole or not at all; a watcher that was killed is started again and goes on. The end is asked for
*before* the checkpoints are listed: a run writes its last checkpoint first and its "end" after it, so a checkpoint that
the listing lacks cannot be one of an ended run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from weftrain.core.errors import CheckpointError, RunFolderError
from weftrain.core.formats.checkpoint_manifest import STEP_FOLDER
from weftrain.core.run.metrics import effective_records

Say = Callable[[str], None]
_Identity = tuple[str, int, int]  # name, inode, time of last change: a folder that took another's place is another one


def watch(
    run: Path,
    evaluate: Callable[[Path], object],
    *,
    every_seconds: float = 30.0,
    until_step: int | None = None,
    say: Say = print,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[int]:
    """Call `evaluate` for each checkpoint of a run folder, the oldest first, and wait for more. The steps that were
    evaluated.

    evaluate: raises CheckpointError for a checkpoint that is damaged, which is passed over with one line, and looked at
    again only when another takes its place; any other error ends the watch. It ends when the run's metrics say so and
    all is done, or when a checkpoint of `until_step` or of a later step is there and all up to it are done.
    every_seconds: between two looks; a look that takes longer is followed by the next at once.
    """
    seen: set[_Identity] = set()
    steps: list[int] = []
    told: set[str] = set()
    while True:
        started = clock()
        ended = _has_ended(run, lambda line: _once(line, told, say))
        found = _checkpoints(run / "checkpoints")
        for step, path in found:
            if (
                (until_step is not None and step > until_step)
                or (identity := _identity(path)) is None
                or identity in seen
            ):
                continue
            try:
                evaluate(path)
            except CheckpointError as error:
                if _identity(path) != identity:
                    continue  # it was moved or replaced meanwhile: the next look finds what is there then
                say(f"WARNING: step {step} is passed over, its checkpoint is damaged: {error}")
            else:
                steps.append(step)
            seen.add(identity)
        reached = until_step is not None and any(step >= until_step for step, _ in found)
        # Once more where something was moved during this look.
        if (ended or reached) and all(
            _identity(path) in seen
            for step, path in _checkpoints(run / "checkpoints")
            if until_step is None or step <= until_step
        ):
            return steps
        sleep(max(0.0, every_seconds - (clock() - started)))


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what bears a checkpoint's name, the oldest first. Temporary names and what was set aside have
    others.
    """
    try:
        entries = list(folder.iterdir())
    except FileNotFoundError:
        return []
    return sorted((int(match[1]), path) for path in entries if (match := STEP_FOLDER.fullmatch(path.name)))


def _identity(path: Path) -> _Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return path.name, status.st_ino, status.st_mtime_ns


def _has_ended(run: Path, say: Say) -> bool:
    """Whether the last that the run's metrics tell of its beginnings and ends is an end."""
    last = None
    try:
        for record in effective_records(run):
            if record["kind"] in ("start", "resume", "end"):
                last = record["kind"]
    except RunFolderError as error:
        say(f"WARNING: whether the run has ended cannot be told: {error}")
        return False
    return last == "end"


def _once(line: str, told: set[str], say: Say) -> None:
    if line not in told:
        told.add(line)
        say(line)
