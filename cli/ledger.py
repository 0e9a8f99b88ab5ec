"""`weftrain log`, `rollback`, `defer`: a run's ledger, and the two commands for a loss spike."""

from __future__ import annotations

import contextlib
import datetime
import heapq
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from weftrain.cli.display import Console
from weftrain.cli.remote import RunPath
from weftrain.core.errors import printable

if TYPE_CHECKING:
    from weftrain.core.backend import StoredState

_Run, _ChangedRun = RunPath(exists=True, file_okay=False), RunPath(changes=True, exists=True, file_okay=False)


@click.command("log")
@click.argument("run", type=_Run)
@click.option(
    "--samples", type=click.IntRange(min=0), metavar="STEP", help="Show how the 0-based step STEP was trained instead."
)
@click.option("--json", "as_json", is_flag=True, help="Print the ledger's lines unchanged.")
def log(run: Path, samples: int | None, as_json: bool) -> None:
    """Print the ledger of RUN, a run's or a release's folder, as a tree: starts, chunks, checkpoints, branches."""
    from weftrain.core.errors import RunFolderError
    from weftrain.core.formats.canonical import canonical_json
    from weftrain.core.run.ledger import read_ledger
    from weftrain.core.run.ledger_schema import LEDGER
    from weftrain.core.run.lineage import lineage

    entries = read_ledger(run / LEDGER)
    if not entries:
        raise RunFolderError(f"{run / LEDGER}: there is no ledger: name a run's folder that was trained, or a release")
    if as_json:
        for entry in entries:
            click.echo(canonical_json(entry).decode())
        return
    console = Console()
    line = lineage(entries)
    if samples is not None:
        try:
            segment, (first, stop), span = line.origin(samples)
        except ValueError as error:
            raise RunFolderError(f"{run / LEDGER}: {error}") from error
        chunk = "" if span is None else f", chunk {span.chunk} at place {span.place}"
        console.print(f"step {samples}: samples {first}..{stop - 1}{chunk}, of dataset {segment.dataset_id}")
        console.print(
            f"trained in the segment that the ledger's line {segment.entry} began, at step {segment.first_step}, from "
            + ("scratch" if segment.parent is None else f"checkpoint {segment.parent}")
        )
        return
    shown = heapq.merge(entries, _told_alerts(run), key=lambda entry: float(entry["time"]))
    click.echo("\n".join(_tree(run, shown, {point.entry for point in line.checkpoints}, line.removed)))


def _told_alerts(run: Path) -> list[dict[str, Any]]:
    """The alerts after which the run was not changed: they are lines of metrics.jsonl alone."""
    from weftrain.core.run.metrics import METRICS
    from weftrain.core.run.metrics_lines import checked_line
    from weftrain.core.run.step_lines import lines_from_the_end

    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in lines_from_the_end(run / METRICS, b'"kind": "alert"'):
            with contextlib.suppress(ValueError):  # the readers of the measurements report a damaged line
                record = checked_line(line)
                if record["kind"] == "alert" and record["action"] == "log" and "time" in record:
                    found.append(record)
    return found[::-1]


Branch = tuple[str, list[str]]  # a line of the tree, and those below it


def _tree(
    run: Path, entries: Iterable[dict[str, Any]], on_line: Collection[int], removed: Collection[str]
) -> Iterator[str]:
    """The lines of the tree, which a terminal wraps where it likes: rich draws three thousand a second."""
    tree: list[Branch] = []
    segment: list[str] | None = None  # what is below the newest start
    for entry in entries:
        kind = entry["kind"]
        words = f"step {entry['step']:>6}  {_words(entry)}"
        if kind == "checkpoint" and entry["n"] not in on_line:
            words += " (abandoned)"
        elif kind == "checkpoint" and entry["root"] in removed:
            words += " (removed)"
        if segment is None or kind in ("start", "resume", "rollback", "defer", "recipe", "remove"):
            tree.append((words, []))
            segment = tree[-1][1] if kind in ("start", "resume") else segment
        else:
            segment.append(words)
    yield str(run)
    for number, (words, below) in enumerate(tree, 1):
        branch, stem = ("├── ", "│   ") if number < len(tree) else ("└── ", "    ")
        yield from _label(words, branch, stem + ("│   " if below else ""))
        for place, leaf in enumerate(below, 1):
            branch, under = ("├── ", "│   ") if place < len(below) else ("└── ", "    ")
            yield from _label(leaf, stem + branch, stem + under)


def _label(words: str, branch: str, stem: str) -> Iterator[str]:
    """A text of any origin, which may have several lines."""
    first, *others = printable(words, keep="\n").split("\n")
    yield branch + first
    yield from (stem + other for other in others)


def _words(entry: dict[str, Any]) -> str:
    when = (
        datetime.datetime.fromtimestamp(entry["time"], datetime.UTC)
        .isoformat(sep=" ", timespec="seconds")
        .removesuffix("+00:00")
    )
    kind = entry["kind"]
    if kind in ("start", "resume"):
        environment = entry["environment"]
        threads = f", {environment['threads']} threads" if "threads" in environment else ""
        who = f"{environment.get('backend')} on {environment.get('device')}{threads}"
        origin = "from scratch" if entry["parent"] is None else f"from {entry['parent'][:12]}"
        return (
            f"{kind} {origin}  {when} UTC  {who}, dataset {entry['dataset_id'][:12]}, recipe "
            f"{entry['recipe_sha256'][:12]}"
        )
    if kind in ("chunk_begin", "chunk_end"):
        first, stop = entry["samples"]
        return (
            f"chunk {entry['chunk']} {kind.removeprefix('chunk_')}s  place {entry['place']}, samples "
            f"{first}..{stop - 1}"
        )
    if kind == "checkpoint":
        return f"checkpoint {entry['root'][:12]}  metrics {entry['metrics_sha256'][:12]}"
    if kind == "recipe":
        from weftrain.core.run.run_folder import follows

        told = ", ".join(f"{key}: {old} -> {new}" for key, old, new in entry["changes"] if not follows(key))
        begun = entry["recipe"].get("data", {}).get("continues")
        if begun is not None and any(follows(key) for key, _, _ in entry["changes"]):
            told += f"{', ' if told else ''}the data go on at sample {begun['sample']:,}"
        why = f": {entry['reason']}" if entry.get("reason") else ""
        return (
            f"recipe changed  {told}{why}"
            if told
            else "recipe          the same, recorded with the keys that this version has beside"
        )
    if kind == "rollback":
        return (
            f"rolled back to {entry['root'][:12]}  {len(entry['abandoned'])} checkpoints on branch {entry['branch']}: "
            f"{entry['reason']}"
        )
    if kind == "alert":
        return f"alert {entry['words']}"
    if kind == "defer":
        done = "deferred" if entry["action"] == "defer" else "dropped"
        return f"chunk {entry['chunk']} {done}: {entry['reason']}"
    if kind == "remove":
        return f"removed {len(entry['removed'])} checkpoints  of steps {_listed(step for step, *_ in entry['removed'])}"
    if kind == "evaluation":
        of = "" if entry.get("checkpoint") is None else f"  of checkpoint {entry['checkpoint'][:12]}"
        return f"score {entry['set']}  {entry['sha256'][:12]}{of}"
    if kind == "skip":
        return f"step skipped  samples {entry['samples'][0]}..{entry['samples'][1] - 1}"
    return f"{kind}  {when} UTC"


def _listed(steps: Iterable[int]) -> str:
    """The first few of many numbers."""
    shown = [str(step) for step in steps]
    return ", ".join(shown[:4]) + (f" .. {shown[-1]}" if len(shown) > 4 else "")


@click.command("rollback")
@click.argument("run", type=_ChangedRun)
@click.option(
    "--to", "step", type=click.IntRange(min=0), required=True, help="Completed steps of the checkpoint to go back to."
)
@click.option("--reason", required=True, help="Reason, recorded in the ledger.")
def rollback(run: Path, step: int, reason: str) -> None:
    """Go back to an earlier checkpoint of RUN. Nothing is deleted: later checkpoints become a branch of the ledger."""
    from weftrain.core.errors import WeftrainError
    from weftrain.core.run.ledger import Ledger
    from weftrain.core.run.rollback import rollback as go_back
    from weftrain.core.run.run_folder import held_run

    with held_run(run):
        try:
            kept = _stored_state(run)
        except (
            WeftrainError
        ) as error:  # where later checkpoints say that there is something to go back from, it does not matter
            click.echo(f"warning: {error}", err=True)
            kept = None
        branch = go_back(run, Ledger(run), step, reason, kept)
    click.echo(
        f"{run}: goes on from step {step}; {len(branch.abandoned)} later checkpoints are in "
        f"{run / 'branches' / str(branch.number)}"
    )


def _stored_state(run: Path) -> StoredState | None:
    """State that the backend of the run in `run` keeps by itself. Raises RunFolderError, RecipeError, BackendError."""
    from weftrain.cli.resolve import backend_options, resolve_recorded
    from weftrain.core.run.run_folder import RECIPE, stored_recipe

    tree = stored_recipe(run, missing_ok=True)
    if tree is None:
        return None
    file = resolve_recorded(tree, str(run / RECIPE))
    backend, options = backend_options(file)
    return backend.stored_state(file.recipe, options, run)


@click.command("defer")
@click.argument("run", type=_ChangedRun)
@click.option(
    "--chunk", type=click.IntRange(min=0), required=True, help="Chunk of the run, counted from 0 (data.chunks)."
)
@click.option("--drop", is_flag=True, help="Never train on it.")
@click.option("--reason", required=True, help="Reason, recorded in the ledger.")
def defer(run: Path, chunk: int, drop: bool, reason: str) -> None:
    """Move a chunk of RUN that is not trained yet to the end of the run. `weftrain train` then follows the ledger."""
    from weftrain.core.recipe_file import recorded_recipe
    from weftrain.core.run.ledger import Ledger
    from weftrain.core.run.rollback import defer_chunk
    from weftrain.core.run.run_folder import RECIPE, held_run, stored_recipe

    with held_run(run):
        recipe = recorded_recipe(stored_recipe(run), str(run / RECIPE)).recipe
        action: Literal["defer", "drop"] = "drop" if drop else "defer"
        entry = defer_chunk(run, Ledger(run), recipe, chunk, action, reason, _stored_state(run))
    click.echo(
        f"{run}: chunk {chunk} is {'dropped' if drop else 'deferred'} from step {entry['step']} on; train goes on with "
        "it"
    )
