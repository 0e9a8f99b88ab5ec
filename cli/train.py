"""`weftrain train`: put a run together, train it, and end with a summary.

What a reader would get wrong: there is no separate `resume`. The same command starts a run, continues an interrupted
one, and says so where it is complete. A signal finishes the step, saves, and exits with 128 + its number.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weftrain.analysis.report.summary import summarize
from weftrain.cli.display import Bar, Console, PreparationBar, follows, program
from weftrain.cli.show import arithmetic
from weftrain.cli.train_command import TrainCommand
from weftrain.core.config import Recipe
from weftrain.core.formats.safe_names import checked_segment
from weftrain.core.formats.units import gib
from weftrain.core.parameters import parameter_specs
from weftrain.core.recipe_file import RecipeFile, recorded_recipe
from weftrain.core.run.metrics import heldout_label
from weftrain.core.stop import StopRequest

if TYPE_CHECKING:
    from weftrain.core.backend import Backend, Fingerprint, Follower, Job, Run
    from weftrain.core.evaluators import Evaluator
    from weftrain.core.formats.strict_model import StrictModel
    from weftrain.core.resume import Start
    from weftrain.core.run.starting_checkpoint import ForeignWeights
    from weftrain.core.trainer import TrainedStep

SHOWN_CHARACTERS = 48  # of a prompt and of its continuation, in the line of a sample
_BEYOND_TARGET = "to continue: log.stop_at_loss=null, or a lower loss"
SAVE_NOW = "save-now"  # a file in a run's folder: whoever makes it asks for a checkpoint at the end of the step
SHOWN_CHANGES = 8  # keys in which a run's own recipe differs from the built-in one, listed when it goes on


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder that holds run folders.",
)
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
    runs: Path,
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
    again = TrainCommand(recipe, overrides, backend, runs, run_name)
    file = again.asked()
    name = run_name or file.recipe.name
    try:
        checked_segment(name)
    except ValueError as error:
        raise click.BadParameter(
            f"{error}; a run name is one word, and --runs names the folder", param_hint="--run"
        ) from error
    kept = again.over_stored(runs / name, overrides)
    if not follows():  # at once: what comes next imports torch, which takes seconds
        if kept is not None:
            _say_kept(console, recipe, runs / name, file.recipe, kept.recipe)
        _describe(console, (kept or file).recipe)
    file = kept or file
    from weftrain.core.backend import Follower

    with StopRequest() as stop:
        chosen, options = backend_options(file)
        if isinstance(chosen, Follower) and chosen.follows():
            _run_worker(chosen, options, file.recipe, runs / name, stop)
        else:
            _train(console, file, runs, name, set(allow), stop, again, grace, **asked)
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
    runs: Path,
    name: str,
    allow: set[str],
    stop: StopRequest,
    again: TrainCommand,
    grace: float | None,
    **asked: bool,
) -> None:
    """Decide how the run starts, prepare the backend, and train. Nothing is written before training begins."""
    from weftrain.cli.assembly import open_data, open_evaluators
    from weftrain.cli.resolve import backend_options
    from weftrain.core.resume import decide
    from weftrain.core.run.prepare import prepare_run
    from weftrain.core.run.retention_rule import disk_warning
    from weftrain.core.run.run_folder import open_run

    file, decided = _with_decisions(console, file, runs / name)
    backend, options = backend_options(file)
    source, heldout = open_data(file.recipe)
    evaluators = open_evaluators(file.recipe, backend, heldout)
    with open_run(runs / name, file.recipe.model_dump(mode="json")) as folder, contextlib.ExitStack() as ending:
        start = decide(
            folder,
            file.recipe,
            source,
            backend,
            options,
            runs,
            allow=allow | decided,
            say=console.print,
            heldout=[held.name for held in heldout],
            open_folder=_open_folder,
            **asked,
        )
        if start.complete or _at_target(start):
            return _say_complete(console, start, backend, start.job(options, stop=stop), again)
        if warning := disk_warning(start.recipe, folder.path):
            console.print(f"warning: {warning}")
        began = time.monotonic()
        with PreparationBar(console) as told:
            run = prepare_run(backend, start.job(options, progress=told, stop=stop))
            # also after an error: what a backend stores becomes durable, and other processes learn of the end
            ending.callback(run.close)
            if start.state is not None:
                run.import_state(start.state)
        if stop.number:  # there is nothing to save yet, and the first step may take longer than the grace period
            return console.print("stopped before the first step; the same command starts again")
        preparation_s = time.monotonic() - began
        done, saved = _fit(console, start, backend, run, evaluators, stop, told, preparation_s, grace)
    if stop.number and saved < done:
        console.print(f"stopped after step {done}, not saved; the same command resumes from step {saved}")
    elif stop.number and not done:
        console.print("stopped before the first step; the same command starts again")
    elif stop.number:
        console.print(f"stopped after step {done} and saved; the same command resumes")
    else:
        ended = done == start.plan.last_step
        more = again.to_continue(start.recipe, start.source, runs / name, done) if ended else _BEYOND_TARGET
        _summarize(console, runs / name, more)


def _open_folder(folder: Path) -> ForeignWeights:
    from weftrain.exchange.huggingface.importing import open_start

    return open_start(folder)


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
) -> tuple[int, int]:
    """Record the start, train with `fit`, and record the end. How many steps are complete, and how many are saved."""
    from weftrain.cli.assembly import run_speed
    from weftrain.core.resume import commit
    from weftrain.core.run.metrics import METRICS, MetricsWriter
    from weftrain.core.trainer import fit

    recipe, plan, folder, first = start.recipe, start.plan, start.folder, start.plan.start_step
    fingerprint = run.fingerprint()
    ledger = commit(start, {**fingerprint.as_json(), "weftrain": importlib.metadata.version("weftrain")})
    speed = run_speed(recipe, backend, run, folder.path / METRICS)
    _announce(console, recipe, fingerprint, speed.peak, folder.path, first)
    with (
        MetricsWriter(
            folder.path,
            recipe.log.tensorboard,
            start.resumed_step,
            repaired=True,
            hyperparameters=recipe.model_dump(mode="json"),
        ) as metrics,
        Bar(console, folder.path.name, plan.last_step, first) as bar,
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
            time_to_save=lambda needed_s: grace_s is None or stop.asked_s() + needed_s <= grace_s,
        )
        done, saved = _shown(steps, bar, first)
        if not stop.number:
            metrics.event("end", step=done)
            ledger.add("end", step=done)
    return done, saved


def _asked_to_save(stop: StopRequest, run: Path) -> bool:
    """Whether a signal or the file `save-now` in the run's folder asks for a checkpoint now. The file is removed."""
    file = run / SAVE_NOW
    if found := file.exists():
        file.unlink(missing_ok=True)
    return stop.take_save() or found


def _at_target(start: Start) -> bool:
    """Whether the run ended at its `log.stop_at_loss`, as its last evaluation says."""
    from weftrain.core.run.metrics import effective_records
    from weftrain.core.trainer import at_target

    if start.recipe.log.stop_at_loss is None:
        return False
    step = start.plan.start_step
    records = effective_records(start.folder.path, start.found.damaged_metrics)
    return at_target(start.recipe, (one for one in records if one["kind"] == "evaluation" and one["step"] == step))


def _say_complete(console: Console, start: Start, backend: Backend, job: Job, again: TrainCommand) -> None:
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
    _summarize(console, run, more)
    if isinstance(backend, Follower):
        backend.nothing_to_lead(job)


def _shown(steps: Iterator[TrainedStep], bar: Bar, first: int) -> tuple[int, int]:
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
        for problem in progress.problems:
            bar.say(f"warning: {problem}")
        bar.update(done, loss)
    return done, saved


def _measured(line: Mapping[str, Any]) -> str:
    """A line of an evaluator, in words."""
    if line["kind"] == "sample":
        return "sample " + (line.get("problem") or f"{_short(line['prompt'])} -> {_short(line['text'])}")
    return f"held-out {heldout_label(line)}: loss {line['loss']:.4f}, perplexity {line['perplexity']:,.2f}"


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


def _describe(console: Console, recipe: Recipe) -> None:
    console.print(f"{recipe.name}: {recipe.description}")
    for line in arithmetic(recipe):
        console.print(line)


def _say_kept(console: Console, name: str, folder: Path, asked: Recipe, kept: Recipe) -> None:
    """Say in what the run's own recipe stays as it is, where the built-in one says something else."""
    from weftrain.core.run.run_folder import differences, shown

    changes = differences(asked.model_dump(mode="json"), kept.model_dump(mode="json"))
    if not changes:
        return
    console.print(f"{folder} goes on with the recipe it was made with; {name} differs from that in:")
    for key, built_in, own in changes[:SHOWN_CHANGES]:
        console.print(f"  {key}: {shown(own)} ({name}: {shown(built_in)})")
    if len(changes) > SHOWN_CHANGES:
        console.print(f"  and {len(changes) - SHOWN_CHANGES} more keys: see {folder / 'recipe.yaml'}")


def _announce(
    console: Console, recipe: Recipe, fingerprint: Fingerprint, peak: object, folder: Path, first: int
) -> None:
    where = f"{fingerprint.backend} on {fingerprint.device}"
    threads = f", {fingerprint.threads} threads" if fingerprint.device_type == "cpu" and fingerprint.threads else ""
    console.print(f"backend      {where}{threads}, {recipe.precision.compute}; matrix-multiply peak {peak}")
    chosen: dict[str, set[str]] = {}
    for op, entries in fingerprint.kernels.get("ops", {}).items():
        for entry in entries:
            chosen.setdefault(entry["source"], set()).add(op)
    kernels = "; ".join(f"{source}: {', '.join(sorted(ops))}" for source, ops in sorted(chosen.items()))
    console.print(f"kernels      {kernels or 'none'}")
    for origin, reason in fingerprint.kernels.get("broken_plugins", {}).items():
        console.print(f"warning: kernels: {origin} was passed over: {reason}")
    if recipe.precision.numerics == "replayable":
        micro_batches = recipe.batch.accumulation_steps
        sums = (micro_batches & -micro_batches).bit_length()
        size = 4 * sums * sum(spec.size for spec in parameter_specs(recipe.model))
        console.print(
            f"numerics     replayable: {micro_batches} micro-batches a process in a fixed tree, at most {sums} fp32 "
            "sums of the "
            f"gradients = {gib(size)}"
        )
    console.print(f"run          {folder}{f', resumed after step {first}' if first else ''}")


def _summarize(console: Console, folder: Path, more: str) -> None:
    summary = summarize(folder)
    if summary is None:
        console.print(f"no steps were logged; the run lies in {folder}")
        return
    used, peak = summary.model_flops_utilization, summary.peak_flops
    share = (
        "MFU unknown" if used is None or peak is None else f"MFU {used:.1%} of the measured {peak / 1e9:,.0f} GFLOP/s"
    )
    lines = [
        f"loss         {summary.loss_first:.4f} -> {summary.loss_last:.4f} in {summary.steps:,} steps, "
        f"{summary.tokens:,} tokens",
        *(
            [f"skipped      {summary.skipped:,} of these steps: {summary.steps - summary.skipped:,} updates"]
            if summary.skipped
            else []
        ),
        *(f"held-out     {key}: {first:.4f} -> {last:.4f}" for key, (first, last) in summary.heldout.items()),
        f"speed        {summary.tokens_per_second:,.0f} tokens/s, {share}",
        f"run          {folder}  (metrics.jsonl, checkpoints/, tensorboard/, recipe.yaml)",
        "next         tensorboard --logdir " + str(folder / "tensorboard"),
        f"             {program()} eval {shlex.quote(str(folder))}",
        f"             {more}",
    ]
    console.print("\n".join(lines))
