"""Which checkpoints in a run's folder are the run's own, by its ledger; and what a start may make of those that are not
whole.

One crash leaves at most one checkpoint that the ledger does not list: the newest, between its rename and its line. Such
a one is entered when the run goes on, if its parent, recipe and dataset are those of the ledger's line. Anything else
is refused: a checkpoint of another run, a ledger that lost lines, and a run all of whose checkpoints are gone, which
would begin at step 0 again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core import checkpoint
from weftrain.core.errors import CheckpointError, RunFolderError
from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import Lineage, lineage
from weftrain.core.run.rollback import abandoned
from weftrain.core.run.run_folder import differences, shown, with_defaults

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """What a run's checkpoints and its ledger say together.

    newest: the newest whole checkpoint, every byte of it verified. to_enter: manifests that the ledger lacks, oldest
    first. passed_over: newer ones by step, with what is wrong: "damaged", or "missing" where only the ledger has them.
    """

    newest: Path | None
    to_enter: tuple[Manifest, ...]
    passed_over: tuple[tuple[int, str], ...]
    began_again: bool  # the run's last start was one from scratch, which gave up what is passed over


def standing(
    run: Path,
    entries: Sequence[Mapping[str, Any]],
    repair_ledger: bool,
    say: Callable[[str], None],
    follows: Callable[[int], bool] = lambda step: False,
) -> Standing:
    """Find the newest checkpoint of the run in `run`. Nothing is written.

    repair_ledger: checkpoints that follow the ledger's last one may be entered however many there are, and checkpoints
    may stand without any ledger. say: gets a line for each one passed over. follows: whether the run goes on from a
    state in memory that follows a newest checkpoint of so many steps: that is not read then. Raises CheckpointError,
    RunFolderError.
    """
    folder, line, left = run / "checkpoints", lineage(entries), set(abandoned(run, entries))
    present = {step: path for step, path in checkpoint.step_folders(folder).items() if path not in left}
    unread = follows(max(present, default=0))
    newest = checkpoint.newest(folder, lambda text: say(f"warning: {text}"), left, structure_only=unread)
    manifest = None if newest is None else read_checkpoint_manifest(newest)
    reached = -1 if manifest is None else manifest["step"]
    passed = {step: "damaged" for step in present if step > reached}
    for point in line.checkpoints:
        if point.step > reached and point.step not in passed and point.root not in line.removed:
            passed[point.step] = "missing"
            say(
                f"warning: the ledger lists a checkpoint of step {point.step} ({point.root[:12]}), and {folder} does "
                "not hold it"
            )
    to_enter: tuple[Manifest, ...] = ()
    if manifest is not None and all(point.root != manifest["root"] for point in line.checkpoints):
        if entries:
            to_enter = _to_enter(run, manifest, present, line, repair_ledger)
        else:
            _check_no_ledger(run, manifest, repair_ledger)
    for unlisted in to_enter:
        say(
            f"the checkpoint of step {unlisted['step']} ({unlisted['root'][:12]}) is not in the ledger yet and is "
            "entered"
        )
    starts = [entry for entry in entries if entry["kind"] in ("start", "resume")]
    return Standing(
        newest, to_enter, tuple(sorted(passed.items())), bool(starts) and bool(starts[-1].get("from_scratch"))
    )


def _check_no_ledger(run: Path, newest: Manifest, repair: bool) -> None:
    if not repair:
        raise RunFolderError(
            f"{run}: holds checkpoints and no {LEDGER}: restore it from a copy, or begin a new ledger at step "
            f"{newest['step']} with "
            "--repair-ledger (what lies before is then not shown by anything); another run starts from this one with "
            "start_from"
        )


def _to_enter(
    run: Path, newest: Manifest, present: Mapping[int, Path], line: Lineage, repair: bool
) -> tuple[Manifest, ...]:
    """The unlisted checkpoints that lead from the line's last to `newest`. Raises CheckpointError, RunFolderError."""
    path = present[newest["step"]]
    last = line.checkpoints[-1] if line.checkpoints else None
    expected = last.root if last is not None else line.segments[-1].parent if line.segments else None
    older: dict[str, Manifest] = {}
    for step, place in present.items():
        if step < newest["step"]:
            with contextlib.suppress(OSError, ValueError):  # a damaged one is no link
                found = read_checkpoint_manifest(place)
                older[found["root"]] = found
    chain = [newest]
    while chain[0]["parent"] != expected and chain[0]["parent"] in older:
        chain.insert(0, older.pop(chain[0]["parent"]))
    if why := _why_foreign(chain, expected, line):
        raise CheckpointError(
            f"{path}: is not a checkpoint that this run goes on from: {why}: move the folder away, then start again (a "
            "run of its own can "
            "start from it with start_from)"
        )
    if len(chain) > 1 and not repair:
        steps = ", ".join(str(manifest["step"]) for manifest in chain)
        raise RunFolderError(
            f"{run / LEDGER}: does not list the checkpoints of steps {steps}, which follow its last one: it lost "
            "lines, since a crash "
            "leaves out one checkpoint at most: restore it from a copy, or enter them with --repair-ledger, which the "
            "ledger records"
        )
    for manifest in chain[:-1]:
        checkpoint.verify(present[manifest["step"]])
    return tuple(chain)


def _why_foreign(chain: Sequence[Manifest], expected: str | None, line: Lineage) -> str:
    """What shows that a chain of checkpoints is not this run's; empty where nothing does."""
    # One that a rollback left may be there again: training from the same state makes the same checkpoint once more.
    first, last = chain[0], line.checkpoints[-1] if line.checkpoints else None
    if first["parent"] != expected or (last is not None and first["step"] <= last.step):
        where = "that the run began from" if last is None else f"of step {last.step}"
        return (
            f"its parent is {_short(first['parent'])}, and the ledger's last checkpoint, {where}, is {_short(expected)}"
        )
    for manifest in chain if line.segments else ():
        # a later start may have begun right there
        made = [segment for segment in line.segments if segment.first_step < manifest["step"]]
        segment = made[-1] if made else line.segments[0]
        changes = differences(with_defaults(segment.recipe), with_defaults(manifest["recipe"]))
        if changes:
            listed = ", ".join(f"{key}: {shown(old)} -> {shown(new)}" for key, old, new in changes[:4])
            return f"it was made with another recipe ({listed}{' ..' if len(changes) > 4 else ''})"
        if manifest["dataset_id"] != segment.dataset_id:
            return f"it was trained on dataset {manifest['dataset_id'][:12]}, and this run on {segment.dataset_id[:12]}"
    return ""


def _short(root: str | None) -> str:
    return "none" if root is None else root[:12]
