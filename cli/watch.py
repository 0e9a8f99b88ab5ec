"""`weftrain watch`: what runs are doing, live in the terminal, or as a line now and then."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from weftrain.cli.arguments import NamedPath, complete_runs
from weftrain.cli.display import Console
from weftrain.core.errors import printable

if TYPE_CHECKING:
    from weftrain.analysis.watch.view import RunState, RunView

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_BLOCKS = "_.-:=+*#"
_LIVE_S, _LINES_S = 2.0, 60.0  # between two looks, with and without a terminal
_STYLES = {"running": "green", "writing": "green", "complete": "bold", "stalled": "bold red", "unreadable": "red"}


@click.command("watch")
@click.argument(
    "runs",
    nargs=-1,
    required=True,
    metavar="RUN...",
    type=NamedPath(path_type=Path, exists=True, file_okay=False),
    shell_complete=complete_runs,
)
@click.option("--once", is_flag=True, help="Print a line for each run, and end.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.1, max=86_400),
    metavar="SECONDS",
    help="Between two looks.  [default: 2 in a terminal, else 60]",
)
@click.option(
    "--stall",
    "stall_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Without a line for so long a run is stalled.  [default: ten times its usual time, at least 60]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, in one line, at each look.")
def watch(runs: tuple[Path, ...], once: bool, interval_s: float | None, stall_s: float | None, as_json: bool) -> None:
    """Show what RUN is doing, until it is complete: loss, speed, time left, checkpoint, evaluations, alerts.

    Several runs are a table, and a folder of runs stands for all in it. Without a terminal, one line for each run is
    printed at each look. Only the ends of a run's files are read. Ctrl-C ends it; the run goes on.

    \b
    Fields of --json: name, state, step, steps, loss, tokens_per_second, eta_s, checkpoint_step, checkpoint_time,
    evaluations (set -> step, loss), scores (task and metric -> step, value), alerts (step, words), age_s (of the
    newest line), problem.
    State: running, writing (by another machine), stalled, stopped, complete, started, unreadable.
    """
    from weftrain.analysis.watch.view import RunView, runs_in

    folders = [folder for run in runs for folder in runs_in(run)]
    if not folders:
        raise click.BadParameter(f"there is no run in '{runs[0]}'", param_hint="RUN")
    console = Console()
    live = console.is_terminal and not (once or as_json)
    looks = _looks(
        [RunView(folder, stall_s) for folder in folders], once, interval_s or (_LIVE_S if live else _LINES_S)
    )
    try:
        if live:
            _show(console, looks)
        else:
            for states in looks:
                for line in _lines(states, as_json):
                    click.echo(line)
                sys.stdout.flush()
    except KeyboardInterrupt:
        return


def _looks(views: Sequence[RunView], once: bool, interval_s: float) -> Iterator[list[RunState]]:
    """What the runs are doing, now and after each interval, until all are complete."""
    while True:
        states = [view.update() for view in views]
        yield states
        if once or all(one.state == "complete" for one in states):
            return
        time.sleep(interval_s)


def _show(console: Console, looks: Iterator[list[RunState]]) -> None:
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as screen:
        for states in looks:
            width = console.width
            blocks = _BLOCKS if (console.encoding or "").lower().startswith("utf") else _PLAIN_BLOCKS
            screen.update(_one(states[0], width, blocks) if len(states) == 1 else _table(states, blocks), refresh=True)


def _text(words: str, **options: Any) -> Text:
    return Text(printable(words), **options)


def _one(state: RunState, width: int, blocks: str) -> RenderableType:
    """A few lines about one run."""
    rows = [
        ("step", _progress(state)),
        ("loss", f"{_loss(state)}  {sparkline(state.losses, width - 34, blocks)}"),
        ("speed", f"{_speed(state)}  {sparkline(state.speeds, width - 34, blocks)}"),
        *((f"held-out {name}", f"{loss:.4f} at step {step:,}") for name, (step, loss) in state.evaluations.items()),
        *((f"score {name}", f"{value:.4f} at step {step:,}") for name, (step, value) in state.scores.items()),
        ("checkpoint", _checkpoint(state)),
        ("newest line", "-" if state.age_s is None else f"{duration(state.age_s)} ago"),
        *(("alert", f"step {step:,}  {words}") for step, words in state.alerts),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows if state.problem is None else (("problem", state.problem),):
        table.add_row(_text(name), _text(value, style="bold red" if name in ("alert", "problem") else ""))
    return Group(_text(f"{state.name}  {state.state}", style=_STYLES.get(state.state, "")), table)


def _table(states: Sequence[RunState], blocks: str) -> RenderableType:
    table = Table("run", "state", "step", "loss", "", "tokens/s", "left", "checkpoint", "alert", box=None)
    for one in states:
        left = "" if one.eta_s is None or one.state == "complete" else duration(one.eta_s)
        alert = f"step {one.alerts[-1][0]:,} {one.alerts[-1][1]}" if one.alerts else one.problem or ""
        table.add_row(
            _text(one.name),
            _text(one.state, style=_STYLES.get(one.state, "")),
            _text(f"{one.step:,}" if one.steps is None else f"{one.step:,} of {one.steps:,}"),
            _text(_loss(one)),
            _text(sparkline(one.losses, 16, blocks)),
            _text("" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}"),
            _text(left),
            _text("" if one.checkpoint_step is None else f"{one.checkpoint_step:,}"),
            _text(alert, style="bold red", overflow="ellipsis", no_wrap=True),
        )
    return table


def _lines(states: Sequence[RunState], as_json: bool) -> Iterator[str]:
    if as_json:
        yield json.dumps([one.as_json() for one in states], allow_nan=False)
        return
    for one in states:
        if one.problem is not None:
            yield f"{one.name}: {one.state}: {one.problem}"
            continue
        parts = [one.state, f"step {_progress(one)}", f"loss {_loss(one)}", _speed(one)]
        parts += [f"held-out {name} {loss:.4f}" for name, (_, loss) in one.evaluations.items()]
        parts += [f"checkpoint {_checkpoint(one)}", f"newest line {duration(one.age_s or 0.0)} ago"]
        parts += [f"alert at step {one.alerts[-1][0]:,}: {one.alerts[-1][1]}"] if one.alerts else []
        yield f"{one.name}: {', '.join(parts)}"


def _progress(state: RunState) -> str:
    if not state.steps:
        return f"{state.step:,}"
    left = "" if state.eta_s is None or state.state == "complete" else f", {duration(state.eta_s)} left"
    return f"{state.step:,} of {state.steps:,} ({state.step / state.steps:.1%}{left})"


def _loss(state: RunState) -> str:
    return "-" if state.loss is None else f"{state.loss:.4f}"


def _speed(state: RunState) -> str:
    return "-" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f} tokens/s"


def _checkpoint(state: RunState) -> str:
    if state.checkpoint_step is None or state.checkpoint_time is None:
        return "none"
    return f"of step {state.checkpoint_step:,}, {duration(time.time() - state.checkpoint_time)} ago"


def sparkline(values: Sequence[float], width: int, blocks: str = _BLOCKS) -> str:
    """The values as a line of blocks, the greatest of each part, so that no spike is lost; one that is not finite is a
    cross.
    """
    if not values or width < 1:
        return ""
    width = min(width, len(values))
    edges = [len(values) * place // width for place in range(width + 1)]
    parts = [values[start:stop] for start, stop in pairwise(edges)]
    finite = [[one for one in part if abs(one) < float("inf")] for part in parts]
    heights = [max(part) if part else None for part in finite]
    known = [one for one in heights if one is not None]
    if not known:
        return "x" * width
    low, high = min(known), max(known)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join("x" if one is None else blocks[round((one - low) * scale)] for one in heights)


def duration(seconds: float) -> str:
    """'42 s', '12 min', '3 h 05 min', '4 d 02 h'."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7_200:
        return f"{whole // 60} min"
    if whole < 172_800:
        return f"{whole // 3_600} h {whole % 3_600 // 60:02} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3_600:02} h"
