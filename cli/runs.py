"""`weftrain runs`: the runs in a folder, the most recently active first."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import click
from rich.table import Table

from weftrain.cli.arguments import NamedPath
from weftrain.cli.display import Console, program


@click.command("runs")
@click.argument("folder", type=NamedPath(path_type=Path, file_okay=False), default=Path("runs"))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def runs(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER (default: runs): state, step, loss, last activity, the most recently active first.

    A run is complete, running, stopped (the same `weftrain train` command resumes it), started (no step is logged yet)
    or unreadable. `running` is known for processes of this machine only.

    \b
    Fields of --json: name, state, step (completed), steps (of the recipe), loss (the last logged), backend,
    active_s (seconds since 1970), problem (of an unreadable run).
    """
    from weftrain.analysis.report.run_list import list_runs

    if not folder.is_dir() and folder != Path("runs"):
        raise click.BadParameter(f"'{folder}' is not a folder: name the one that --runs names", param_hint="FOLDER")
    found = list_runs(folder) if folder.is_dir() else []
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(run) for run in found], indent=1))
        return
    if not found:
        click.echo(f"no runs in {folder}: `{program()} train crystal_demo` makes one")
        return
    table = Table("run", "state", "step", "loss", "backend", "last activity", box=None)
    for run in found:
        step = f"{run.step:,}" if run.steps is None else f"{run.step:,} of {run.steps:,}"
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        table.add_row(run.name, run.state, step, loss, run.backend or "", _ago(time.time() - (run.active_s or 0.0)))
    console = Console(soft_wrap=False)
    console.print(table)
    for run in found:
        if run.problem is not None:
            console.print(f"{run.name}: {run.problem}")


def _ago(seconds: float) -> str:
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if (count := int(seconds // size)) >= 1:
            return f"{count:,} {unit}{'s' if count > 1 else ''} ago"
    return "now" if seconds < 5 else f"{int(seconds)} seconds ago"
