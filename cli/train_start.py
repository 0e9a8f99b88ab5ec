"""One start of `weftrain train`: decide what it goes on from, prepare the backend, train, and say how it ended.

A command makes one start after another where its recipe plans a change or an alert asks for a way back. What stays the
same over all of them is its `Command`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftrain.cli.display import Bar, Console, PreparationBar
from weftrain.cli.train_command import TrainCommand
from weftrain.cli.train_words import announce, summarize_run
from weftrain.core.backend import Continues
from weftrain.core.objectives_section import MEASURES
from weftrain.core.recipe_file import RecipeFile
from weftrain.core.run.metrics import heldout_label
from weftrain.core.run.scores import SCORE
from weftrain.core.stop import StopRequest

if TYPE_CHECKING:
    from weftrain.cli.remote import RunsPlace
    from weftrain.core.backend import Backend, Job, Run
    from weftrain.core.evaluators import Evaluator
    from weftrain.core.formats.strict_model import StrictModel
    from weftrain.core.order.batch import BatchSource, EvaluationSource
    from weftrain.core.resume import Start
    from weftrain.core.run.alert_actions import RollbackAsked
    from weftrain.core.run.observers import Observers
    from weftrain.core.run.run_folder import RunFolder
    from weftrain.core.trainer import TrainedStep

SHOWN_CHARACTERS = 48  # of a prompt and of its continuation, in the line of a sample
_BEYOND_TARGET = "to continue: log.stop_at_loss=null, or a lower loss"
SAVE_NOW = "save-now"  # a file in a run's folder: whoever makes it asks for a checkpoint at the end of the step


@dataclass
class Command:
    """What stays the same over all starts of a command. again: how it is called. grace_s: of `--grace`. run: the
    one that the start before has prepared, if the next may go on with it.
    """

    console: Console
    place: RunsPlace
    stop: StopRequest
    again: TrainCommand
    grace_s: float | None
    kept: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    run: Run | None = None

    def left_s(self) -> float:
        """Seconds until the process has to end: those that are left of `train --grace` after a signal."""
        return math.inf if self.grace_s is None else max(0.0, self.grace_s - self.stop.asked_s())

    def prepare(self, start: Start, backend: Backend, options: StrictModel, told: PreparationBar) -> Run:
        """The run of the start before, if it can go on with what it has in memory, or else one that is prepared anew.
        `close` closes it, also after an error: what a backend stores becomes durable then, and other processes learn of
        the end.
        """
        from weftrain.core.run.prepare import prepare_run

        job = start.job(options, progress=told, stop=self.stop)
        if isinstance(self.run, Continues) and self.run.go_on(job):
            return self.run
        self.close()
        self.run = run = prepare_run(backend, job)
        self.kept.callback(run.close)
        if start.state is not None:
            run.import_state(start.state)
        return run

    def close(self) -> None:
        self.run = None
        self.kept.close()


def train_on(
    command: Command, file: RecipeFile, folder: RunFolder, allow: set[str], first: bool, **asked: bool
) -> bool:
    """One start. Nothing is written before training begins. first: of this command. Whether the run goes on by another
    one.
    """
    from weftrain.cli.assembly import open_data
    from weftrain.cli.resolve import backend_options
    from weftrain.core.run.alert_actions import RollbackAsked

    console, stop = command.console, command.stop
    backend, options = backend_options(file)
    source, heldout = open_data(file.recipe)
    with contextlib.ExitStack() as ending:
        start = _decided(command, file, folder, source, backend, options, heldout, allow, ending, **asked)
        if (start.complete and not _lacks_scores(start)) or _at_target(start):
            return _say_complete(console, start, backend, start.job(options, stop=stop), command.again)
        evaluators, options = _checked(command, file, start, backend, options, heldout, first)
        goes_on = False
        try:
            ended = _train_from(command, start, backend, options, evaluators, first)
            goes_on = ended is not None and _say_ended(console, start, command.again, stop, *ended)
        except RollbackAsked as back:
            command.close()
            return _go_back(console, start, backend, options, back, stop)
        finally:
            if not (goes_on and isinstance(command.run, Continues)):
                command.close()
    return goes_on


def _decided(
    command: Command,
    file: RecipeFile,
    folder: RunFolder,
    source: BatchSource,
    backend: Backend,
    options: StrictModel,
    heldout: Sequence[EvaluationSource],
    allow: set[str],
    ending: contextlib.ExitStack,
    **asked: bool,
) -> Start:
    from weftrain.cli.assembly import open_folder, open_place
    from weftrain.core.resume import decide

    return decide(
        folder,
        file.recipe,
        source,
        backend,
        options,
        command.place.runs,
        allow=allow,
        say=command.console.print,
        heldout=[held.name for held in heldout],
        open_folder=open_folder,
        open_place=partial(open_place, ending),
        **asked,
    )


def _checked(
    command: Command,
    file: RecipeFile,
    start: Start,
    backend: Backend,
    options: StrictModel,
    heldout: Sequence[EvaluationSource],
    first: bool,
) -> tuple[list[Evaluator], StrictModel]:
    """The evaluators and backend options of a start, once all that can be refused before it is prepared is checked."""
    from weftrain.cli.assembly import check_stages, open_data, open_evaluators
    from weftrain.cli.observers import check_start
    from weftrain.cli.resolve import backend_options

    console, folder = command.console, start.folder.path
    if first:
        check_stages(replace(file, recipe=start.recipe), backend, console.print)
    if len(start.recipe.changes) < len(file.recipe.changes):
        _, options = backend_options(replace(file, recipe=start.recipe))
        _, heldout = open_data(start.recipe)
    evaluators = open_evaluators(start.recipe, backend, heldout, folder, command.stop.requested)
    check_start(start.recipe, folder, start.found.entries, console.print)
    return evaluators, options


def _train_from(
    command: Command, start: Start, backend: Backend, options: StrictModel, evaluators: list[Evaluator], first: bool
) -> tuple[int, int] | None:
    """How many steps are complete in the end, and how many are saved; None if it was stopped before the first one."""
    began = time.monotonic()
    with PreparationBar(command.console) as told:
        run = command.prepare(start, backend, options, told)
    if command.stop.number:  # there is nothing to save yet, and the first step may take longer than the grace period
        _say_not_begun(command.console, start.plan.start_step)
        return None
    return _fit(command, start, backend, run, evaluators, told, time.monotonic() - began, first)


def _say_not_begun(console: Console, step: int) -> None:
    where, what = (f"after step {step}", "resumes") if step else ("before the first step", "starts again")
    console.print(f"stopped {where}; the same command {what}")


def _say_ended(console: Console, start: Start, again: TrainCommand, stop: StopRequest, done: int, saved: int) -> bool:
    """Tell how a start ended. Whether the run goes on by another one."""
    if stop.number and saved < done:
        console.print(f"stopped after step {done}, not saved; the same command resumes from step {saved}")
    elif stop.number and not done:
        _say_not_begun(console, done)
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
    command: Command,
    start: Start,
    backend: Backend,
    run: Run,
    evaluators: list[Evaluator],
    told: PreparationBar,
    preparation_s: float,
    announced: bool,
) -> tuple[int, int]:
    """Record the start, train with `fit`, and record the end. How many steps are complete, and how many are saved."""
    from weftrain.cli.assembly import run_speed
    from weftrain.cli.observers import observers_of
    from weftrain.core.resume import commit
    from weftrain.core.run.metrics import METRICS, MetricsWriter
    from weftrain.core.trainer import fit

    console, stop, place = command.console, command.stop, command.place
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
            recipe, folder.path, command.left_s, partial(_warn, bar), place.observers(stop.requested)
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
            time_to_save=lambda needed_s: needed_s <= command.left_s(),
        )
        done, saved = _shown(steps, bar, first, observers, plan.wants_state)
        if not stop.number and done not in plan.change_steps:
            metrics.event("end", step=done)
            ledger.add("end", step=done)
    return done, saved


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
    from weftrain.core.resume import enter_end, settle
    from weftrain.core.run.ledger_schema import LEDGER

    run, done = start.folder.path, start.plan.start_step
    ledger = settle(start)
    enter_end(start, ledger)
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


def _shown(
    steps: Iterator[TrainedStep], bar: Bar, first: int, observers: Observers, saves: Callable[[int], bool]
) -> tuple[int, int]:
    """Train, which is what iterating does, and show each step on the bar. How many steps are complete, and how many are
    in a checkpoint. saves: whether the plan saves the state after so many steps.
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
        for problem in (*progress.problems, *observers.recorded(saves(done + 1))):
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
