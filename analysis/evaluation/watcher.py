"""Follow a run and evaluate each checkpoint once as it appears, the oldest first, until the run has ended.

Nothing is stored here: `evaluate` finds existing records, so a killed watcher can be restarted. The end is checked
before the checkpoints are listed: a run writes its last checkpoint before its "end", so an ended run has no checkpoint
that the listing lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from weftrain.analysis.evaluation.records import Say
from weftrain.core.errors import CheckpointError, RunFolderError
from weftrain.core.formats.checkpoint_manifest import STEP_FOLDER
from weftrain.core.run.metrics import run_has_ended

_Identity = tuple[str, int, int]  # name, inode, time of last change: a replaced folder is another one


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
    """Call `evaluate` for each checkpoint of a run, the oldest first, and wait for more; the steps evaluated.

    evaluate: raises CheckpointError for a damaged checkpoint, which is reported and skipped until another takes its
    place; any other error ends the watch. It ends when the metrics record the run's end, or a checkpoint at or beyond
    `until_step` exists, and all up to it are done. every_seconds: between the starts of two looks.
    """
    seen: set[_Identity] = set()
    steps: list[int] = []
    told: set[str] = set()

    def look() -> bool:
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
        return (ended or reached) and all(
            _identity(path) in seen
            for step, path in _checkpoints(run / "checkpoints")
            if until_step is None or step <= until_step
        )

    poll(look, every_seconds=every_seconds, clock=clock, sleep=sleep)
    return steps


def poll(
    look: Callable[[], bool],
    *,
    every_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Look until there is nothing more to come, which `look` says. every_seconds: between the starts of two looks."""
    while True:
        started = clock()
        if look():
            return
        sleep(max(0.0, every_seconds - (clock() - started)))


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints, the oldest first, without temporary names and those moved aside."""
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
    try:
        return run_has_ended(run)
    except RunFolderError as error:
        say(f"WARNING: whether the run has ended cannot be told: {error}")
        return False


def _once(line: str, told: set[str], say: Say) -> None:
    if line not in told:
        told.add(line)
        say(line)
