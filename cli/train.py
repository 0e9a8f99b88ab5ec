"""`weftrain train`: put a run together, train it, and end with a summary.

What a reader would get wrong: there is no separate `resume`. The same command starts a run, continues an interrupted
one, and says so where it is complete. A signal finishes the step, saves, and exits with 128 + its number.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weftrain.cli import remote
from weftrain.cli.display import Bar, Console, PreparationBar, follows
from weftrain.cli.train_command import TrainCommand
from weftrain.cli.train_words import announce, describe, say_kept, summarize_run
from weftrain.core.config import Recipe
from weftrain.core.formats.safe_names import checked_segment
from weftrain.core.objectives_section import MEASURES
from weftrain.core.recipe_file import RecipeFile, recorded_recipe
from weftrain.core.run.metrics import heldout_label
from weftrain.core.run.scores import SCORE
from weftrain.core.stop import StopRequest

if TYPE_CHECKING:
    from weftrain.cli.remote import RunsPlace
    from weftrain.core.backend import Backend, Follower, Job, Run
    from weftrain.core.evaluators import Evaluator
    from weftrain.core.formats.strict_model import StrictModel
    from weftrain.core.resume import Start
    from weftrain.core.run.alert_actions import RollbackAsked
    from weftrain.core.run.observers import Observers
    from weftrain.core.run.run_folder import RunFolder
    from weftrain.core.trainer import TrainedStep

SHOWN_CHARACTERS = 48  # of a prompt and of its continuation, in the line of a sample
_BEYOND_TARGET = "to continue: log.stop_at_loss=null, or a lower loss"
SAVE_NOW = "save-now"  # a file in a run's folder: whoever makes it asks for a checkpoint at the end of the step


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@remote.runs_options
@click.option("--run", "run_name", help="Name of the run folder.  [default: the recipe's name]")
@click.option("--backend", help="Another backend than the recipe's (`weftrain backends` lists them).")
@click.option(
    "--allow", multiple=True, metavar="KEY", help="Resume although this key of the recipe has changed (repeatable)."
)
@click.option(
    "--from-scratch",
    is_flag=True,
    help="Begin at step 0 again if all of the run's checkpoints are damaged or missing; the ledger records it.",
)
@click.option(
    "--repair-ledger",
    is_flag=True,
    help="Continue although the ledger lacks some checkpoints or is missing; the ledger records it.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="From a signal to the end of the process, at most: a save that took longer before is not begun then.",
)
def train(
    recipe: str,
    overrides: tuple[str, ...],
    runs: Path | str,
    staging: Path | None,
    keep: int,
    run_name: str | None,
    backend: str | None,
    allow: tuple[str, ...],
    grace: float | None,
    **asked: bool,
) -> None:
    """Train RECIPE, a built-in name or the path of a .yaml file; again: resume it, or say that it is complete.

    KEY.SUB=VALUE overrides a recipe value, e.g. schedule.steps=100. A run of a built-in recipe continues with the
    recipe it was made with, and overrides apply to that. SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 finish the step, save, and
    exit with 128 + the signal's number. SIGUSR2, or a file `save-now` in the run's folder, saves and goes on.
    """
    from weftrain.cli.resolve import backend_options

    console = Console()
    place = remote.RunsPlace(runs, staging, keep)
    again = TrainCommand(recipe, overrides, backend, place.runs, run_name, place.options)
    name = again.name()
    try:
        checked_segment(name)
    except ValueError as error:
        raise click.BadParameter(
            f"{error}; a run name is one word, and --runs names the folder", param_hint="--run"
        ) from error
    place.open(name, leads=not follows(), say=console.print)
    runs, file = place.runs, again.asked()
    kept = again.over_stored(runs / name, overrides)
    if not follows():  # at once: what comes next imports torch, which takes seconds
        if kept is not None:
            say_kept(console, recipe, runs / name, file.recipe, kept.recipe)
        describe(console, (kept or file).recipe)
    file = kept or file
    from weftrain.core.backend import Follower

    with StopRequest() as stop:
        chosen, options = backend_options(file)
        if isinstance(chosen, Follower) and chosen.follows():
            _run_worker(chosen, options, file.recipe, runs / name, stop)
        else:
            _train(console, file, place, name, set(allow), stop, again, grace, **asked)
    if stop.number:
        sys.exit(128 + stop.number)


def _run_worker(backend: Follower, options: StrictModel, recipe: Recipe, folder: Path, stop: StopRequest) -> None:
    """Take part, silently, in the run that another process started by the same command leads."""
    from weftrain.cli.assembly import open_data
    from weftrain.core.backend import Job, Plan

    job = Job(recipe, Plan(0, recipe.schedule.steps), options, folder=folder, stop=stop)
    backend.run_worker(lambda: job, lambda job: open_data(job.recipe)[0], 0)


def _train(
    console: Console,
    file: RecipeFile,
    place: RunsPlace,
    name: str,
    allow: set[str],
    stop: StopRequest,
    again: TrainCommand,
    grace: float | None,
    **asked: bool,
) -> None:
    """Train, start after start: a run goes on in the same command where its recipe plans a change, or an alert asks for
    a way back.
    """
    from weftrain.core.run.run_folder import open_run

    whole, decided = _with_decisions(console, file, place.runs / name)
    with open_run(place.runs / name, whole.recipe.model_dump(mode="json")) as folder:
        first = True
        while _train_on(console, whole, folder, place, allow | decided, stop, again, grace, first, **asked):
            file = again.over_stored(folder.path, again.overrides) or file
            whole, decided = _with_decisions(console, file, folder.path)
            first, asked = False, dict.fromkeys(asked, False)


def _train_on(
    console: Console,
    file: RecipeFile,
    folder: RunFolder,
    place: RunsPlace,
    allow: set[str],
    stop: StopRequest,
    again: TrainCommand,
    grace: float | None,
    first: bool,
    **asked: bool,
) -> bool:
    """One start: decide what it goes on from, prepare the backend, and train. Nothing is written before training
    begins. first: of this command. Whether the run goes on by another start.
    """
    from weftrain.cli.assembly import check_stages, open_data, open_evaluators, open_folder, open_place
    from weftrain.cli.observers import check_start
    from weftrain.cli.resolve import backend_options
    from weftrain.core.resume import decide
    from weftrain.core.run.alert_actions import RollbackAsked
    from weftrain.core.run.prepare import prepare_run

    backend, options = backend_options(file)
    source, heldout = open_data(file.recipe)
    back: RollbackAsked | None = None
    with contextlib.ExitStack() as ending:
        start = decide(
            folder,
            file.recipe,
            source,
            backend,
            options,
            place.runs,
            allow=allow,
            say=console.print,
            heldout=[held.name for held in heldout],
            open_folder=open_folder,
            open_place=partial(open_place, ending),
            **asked,
        )
        if (start.complete and not _lacks_scores(start)) or _at_target(start):
            return _say_complete(console, start, backend, start.job(options, stop=stop), again)
        if first:
            check_stages(replace(file, recipe=start.recipe), backend, console.print)
        if len(start.recipe.changes) < len(file.recipe.changes):
            backend, options = backend_options(replace(file, recipe=start.recipe))
            _, heldout = open_data(start.recipe)
        evaluators = open_evaluators(start.recipe, backend, heldout, folder.path, stop.requested)
        check_start(start.recipe, folder.path, start.found.entries, console.print)
        began = time.monotonic()
        with PreparationBar(console) as told:
            run = prepare_run(backend, start.job(options, progress=told, stop=stop))
            # also after an error: what a backend stores becomes durable, and other processes learn of the end
            ending.callback(run.close)
            if start.state is not None:
                run.import_state(start.state)
        if stop.number:  # there is nothing to save yet, and the first step may take longer than the grace period
            console.print("stopped before the first step; the same command starts again")
            return False
        preparation_s = time.monotonic() - began
        try:
            done, saved = _fit(console, start, backend, run, evaluators, stop, told, preparation_s, grace, first, place)
        except RollbackAsked as asked_back:
            back = asked_back
    if back is not None:
        return _go_back(console, start, backend, options, back, stop)
    return _say_ended(console, start, again, stop, done, saved)


def _say_ended(console: Console, start: Start, again: TrainCommand, stop: StopRequest, done: int, saved: int) -> bool:
    """Tell how a start ended. Whether the run goes on by another one."""
    if stop.number and saved < done:
        console.print(f"stopped after step {done}, not saved; the same command resumes from step {saved}")
    elif stop.number and not done:
        console.print("stopped before the first step; the same command starts again")
    elif stop.number:
        console.print(f"stopped after step {done} and saved; the same command resumes")
    elif done in start.plan.change_steps:
        return True
    else:
        run, ended = start.folder.path, done == start.plan.last_step
        more = again.to_continue(start.recipe, start.source, run, done) if ended else _BEYOND_TARGET
        summarize_run(console, run, more)
    return False


def _go_back(
    console: Console, start: Start, backend: Backend, options: StrictModel, back: RollbackAsked, stop: StopRequest
) -> bool:
    """Make the run go on from an earlier checkpoint, as an alert asks. Whether it does so in this command."""
    from weftrain.core.run.ledger import Ledger
    from weftrain.core.run.rollback import take_back

    run = start.folder.path
    kept = backend.stored_state(start.recipe, options, run)
    take_back(run, Ledger(run), start.recipe, back.way, back.reached, kept)
    if stop.number:
        console.print(f"stopped; the same command resumes from step {back.way.to_step}")
    return not stop.number


def _fit(
    console: Console,
    start: Start,
    backend: Backend,
    run: Run,
    evaluators: Sequence[Evaluator],
    stop: StopRequest,
    told: PreparationBar,
    preparation_s: float,
    grace_s: float | None,
    announced: bool,
    place: RunsPlace,
) -> tuple[int, int]:
    """Record the start, train with `fit`, and record the end. How many steps are complete, and how many are saved."""
    from weftrain.cli.assembly import run_speed
    from weftrain.cli.observers import observers_of
    from weftrain.core.resume import commit
    from weftrain.core.run.metrics import METRICS, MetricsWriter
    from weftrain.core.trainer import fit

    recipe, plan, folder, first = start.recipe, start.plan, start.folder, start.plan.start_step
    fingerprint = run.fingerprint()
    ledger = commit(start, {**fingerprint.as_json(), "weftrain": importlib.metadata.version("weftrain")})
    speed = run_speed(recipe, backend, run, folder.path / METRICS)
    if announced:
        announce(console, recipe, fingerprint, speed.peak, folder.path, first)
    with (
        MetricsWriter(folder.path, start.resumed_step, repaired=True) as metrics,
        Bar(console, folder.path.name, max(first, recipe.schedule.steps), first) as bar,
        observers_of(
            recipe, folder.path, lambda: _left_s(stop, grace_s), partial(_warn, bar), place.observers(stop.requested)
        ) as observers,
    ):
        metrics.event(
            "start",
            step=first,
            kernels=dict(fingerprint.kernels),
            preparation_s=preparation_s,
            **speed.as_record(),
        )
        told.bar = bar
        steps = fit(
            run,
            plan,
            recipe,
            start.source,
            evaluators,
            folder.checkpoints,
            metrics,
            ledger,
            speed=speed,
            history=start.history,
            should_stop=stop.requested,
            should_save=partial(_asked_to_save, stop, folder.path),
            time_to_save=lambda needed_s: needed_s <= _left_s(stop, grace_s),
        )
        done, saved = _shown(steps, bar, first, observers)
        if not stop.number and done not in plan.change_steps:
            metrics.event("end", step=done)
            ledger.add("end", step=done)
    return done, saved


def _left_s(stop: StopRequest, grace_s: float | None) -> float:
    """Seconds until the process has to end: those that are left of `train --grace` after a signal."""
    return math.inf if grace_s is None else max(0.0, grace_s - stop.asked_s())


def _warn(bar: Bar, problem: str) -> None:
    bar.say(f"warning: {problem}")


def _asked_to_save(stop: StopRequest, run: Path) -> bool:
    """Whether a signal or the file `save-now` in the run's folder asks for a checkpoint now. The file is removed."""
    file = run / SAVE_NOW
    if found := file.exists():
        file.unlink(missing_ok=True)
    return stop.take_save() or found


def _lacks_scores(start: Start) -> bool:
    """Whether the run was stopped amid the evaluation after its last step, which is then all that is left to do."""
    from weftrain.core.run.lineage import lineage
    from weftrain.core.run.scores import lacks_scores

    return lacks_scores(start.recipe, lineage(start.found.entries).scores, start.plan.start_step)


def _at_target(start: Start) -> bool:
    """Whether the run ended at its `log.stop_at_loss`, as its last evaluation says."""
    from weftrain.core.run.metrics import effective_records
    from weftrain.core.trainer import at_target

    if start.recipe.log.stop_at_loss is None:
        return False
    step = start.plan.start_step
    records = effective_records(start.folder.path, start.found.damaged_metrics)
    return at_target(start.recipe, (one for one in records if one["kind"] == "evaluation" and one["step"] == step))


def _say_complete(console: Console, start: Start, backend: Backend, job: Job, again: TrainCommand) -> bool:
    from weftrain.core.backend import Follower
    from weftrain.core.resume import settle
    from weftrain.core.run.ledger_schema import LEDGER

    run, done = start.folder.path, start.plan.start_step
    ledger = settle(start)
    target = "" if start.complete else f", where it reached log.stop_at_loss {start.recipe.log.stop_at_loss}"
    console.print(f"run {run} is complete: {done} of {start.plan.last_step} steps{target}")
    if not ledger.entries:
        console.print(
            f"warning: {run / LEDGER} is still missing: a new one begins when the run is continued with --repair-ledger"
        )
    more = again.to_continue(start.recipe, start.source, run, done) if start.complete else _BEYOND_TARGET
    summarize_run(console, run, more)
    if isinstance(backend, Follower):
        backend.nothing_to_lead(job)
    return False


def _shown(steps: Iterator[TrainedStep], bar: Bar, first: int, observers: Observers) -> tuple[int, int]:
    """Train, which is what iterating does, and show each step on the bar. How many steps are complete, and how many are
    in a checkpoint.
    """
    loss, done, saved = "", first, first
    for progress in steps:
        done = progress.result.step + 1
        if progress.result.skipped:
            why = (
                "its loss or gradient norm is not finite"
                if progress.result.bearing_tokens
                else "no token of its batch bears a loss"
            )
            bar.say(f"warning: step {progress.result.step} was skipped: {why}")
        if progress.log is not None:
            loss = f"loss {progress.log['loss']:.4f}  {progress.log['tokens_per_second']:,.0f} tokens/s"
        for line in progress.measured:
            bar.say(f"step {line['step']:>6}  {_measured(line)}")
        saved = saved if progress.saved is None else progress.saved.step
        if progress.saved is not None and progress.saved.set_aside is not None:
            bar.say(
                f"warning: another checkpoint of step {progress.saved.step} was moved to "
                f"{progress.saved.set_aside.name}"
            )
        for alert in progress.alerts:
            bar.say(f"step {done:>6}  alert {alert.words}")
        for problem in (*progress.problems, *observers.recorded()):
            _warn(bar, problem)
        bar.update(done, loss)
    return done, saved


def _measured(line: Mapping[str, Any]) -> str:
    """A line of an evaluator, in words."""
    if line["kind"] == "sample":
        return "sample " + (line.get("problem") or f"{_short(line['prompt'])} -> {_short(line['text'])}")
    if line["kind"] == SCORE:
        error = f" ± {line['stderr']:.4f}" if "stderr" in line else ""
        found = f"{line['metric']} {line['value']:.4f}{error}"
        return f"score {line['set']}: {line.get('problem') or found}"
    measured = [f"{name.replace('_', ' ')} {line[name]:.4f}" for name in MEASURES if name in line]
    if "perplexity" in line:
        measured = [f"perplexity {line['perplexity']:,.2f}"]
    return f"held-out {heldout_label(line)}: loss {line['loss']:.4f}, {', '.join(measured)}"


def _short(text: str) -> str:
    """A text in one line of a terminal, quoted, with its line ends as escapes."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…")


def _with_decisions(console: Console, file: RecipeFile, folder: Path) -> tuple[RecipeFile, set[str]]:
    """The recipe with the chunks that the run's ledger defers or drops, and the keys of data.skip that they add."""
    from weftrain.core.run.ledger import read_ledger
    from weftrain.core.run.ledger_schema import LEDGER
    from weftrain.core.run.lineage import lineage, with_decisions

    decisions = lineage(read_ledger(folder / LEDGER)).decisions
    own = len(file.recipe.data.skip)
    skip = with_decisions(file.recipe.data, decisions)
    if len(skip) == own:
        return file, set()
    for entry in skip[own:]:
        done = "deferred" if entry["action"] == "defer" else "dropped"
        console.print(f"chunk {entry['chunk']} is {done}, as the ledger says: {entry['reason']}")
    tree = file.recipe.model_dump(mode="json")
    tree["data"]["skip"] = skip
    keys = {f"data.skip.{number}" for number in range(own, len(skip))}
    return recorded_recipe(tree, f"{folder / LEDGER}: with the chunks it defers"), keys
