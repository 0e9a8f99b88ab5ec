"""`weftrain eval`: held-out loss and perplexity of a checkpoint, lm-eval tasks, and pass@k of generated programs.

Held-out loss alone runs on the run's backend and leaves no record; everything else is in cli/evaluate_tasks.py.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Column, Table

from weftrain.cli import arguments, remote
from weftrain.cli.display import Bar, Console

if TYPE_CHECKING:
    from weftrain.core.order.batch import Batch, EvaluationSource


@click.command("eval")
@remote.run
@arguments.overrides
@click.option("--rows", type=click.IntRange(min=1), help="Rows of each held-out set.  [default: all]")
@click.option(
    "--loss-on",
    "loss_on",
    type=arguments.NamedPath(path_type=Path, exists=True),
    multiple=True,
    help="Of a Hugging Face model: measure the loss on a dataset's held-out rows, or on the rows of an ids.jsonl.",
)
@click.option("--backend", help="Backend instead of the run's, with its default options; for held-out loss alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each score instead of a table.")
@click.option("--tasks", help="lm-eval tasks or groups, separated by commas.")
@click.option(
    "--preset",
    type=click.Choice(["llm360"]),
    help="Tasks, shots and metrics of the LLM360 paper, with its scores for comparison.",
)
@click.option(
    "--shots",
    type=click.IntRange(min=0),
    help="Few-shot examples for --tasks.  [default: the task's own number]",
)
@click.option(
    "--include",
    type=arguments.NamedPath(path_type=Path),
    help="Folder of task YAML files; the Python that they name is executed.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Documents of each task, or problems of --code; the record says that it is partial.",
)
@click.option(
    "--code",
    type=arguments.NamedPath(path_type=Path),
    help="Programming problems, JSON lines; computes pass@k by running their tests.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Programs for each problem of --code."
)
@click.option("--k", "ks", default="1", show_default=True, help="k of pass@k, separated by commas, at most --samples.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature of programs; 0: greedy.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Nucleus sampling of programs.  [default: off]",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a program at most."
)
@click.option(
    "--tokenizer",
    type=arguments.NamedPath(path_type=Path),
    help="tokenizer.json.  [default: of the recipe's first source]",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences in a batch.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1234,
    show_default=True,
    help="Seed of few-shot examples and sampling.",
)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--watch", is_flag=True, help="Evaluate each checkpoint of the run as it appears, until the run has ended."
)
@click.option(
    "--every-seconds",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    help="Seconds between two looks of --watch.",
)
@click.option(
    "--until-step",
    type=click.IntRange(min=1),
    help="End --watch at the first checkpoint of this step or a later one.",
)
@click.pass_context
def evaluate(context: click.Context, run: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Measure held-out loss of each set, with perplexity or the objective's measures. RUN is a run (its newest whole
    checkpoint) or a checkpoint's folder; or, with --loss-on, --tasks, --preset or --code, a Hugging Face model's, or a
    folder with one such folder for each revision (step1000, ...).

    With --tasks, --preset or --code: scores of tasks instead. Each becomes a record in RUN/analyses/evaluations, and an
    existing record is not computed again. With --watch: records of every checkpoint, of held-out loss if no task is
    named.

    KEY.SUB=VALUE overrides a value of the recorded recipe, e.g. data.root=/other/place.
    """
    _check(context, options)
    if any(options[name] for name in ("tasks", "preset", "code", "watch", "loss_on")):
        from weftrain.cli.evaluate_tasks import evaluate_records

        evaluate_records(run, overrides, options)
    else:
        _heldout(run, overrides, options["rows"], options["backend"], options["as_json"])


# Option -> the options that give it a meaning, one of which must be there.
_GO_WITH = {
    **dict.fromkeys(("shots", "include"), ("tasks", "preset")),
    **dict.fromkeys(("samples", "ks", "temperature", "top_p", "max_new_tokens"), ("code",)),
    **dict.fromkeys(("limit", "tokenizer"), ("tasks", "preset", "code")),
    **dict.fromkeys(("batch_size", "seed", "precision", "device"), ("tasks", "preset", "code", "watch", "loss_on")),
    **dict.fromkeys(("every_seconds", "until_step"), ("watch",)),
}


def _check(context: click.Context, options: dict[str, Any]) -> None:
    """Refuse an option that would have no effect."""

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    def spelled(name: str) -> str:
        return "--k" if name == "ks" else "--" + name.replace("_", "-")

    for name, others in _GO_WITH.items():
        if given(name) and not any(options[other] for other in others):
            raise click.UsageError(f"{spelled(name)} has no effect without {' or '.join(map(spelled, others))}")
    if options["preset"] and options["shots"] is not None:
        raise click.UsageError("--shots: a preset says how many; name its tasks with --tasks instead")
    records = [name for name in ("tasks", "preset", "code", "watch", "loss_on") if options[name]]
    if options["backend"] and records:
        raise click.UsageError(f"--backend has no effect with {spelled(records[0])}: choose --device and --precision")
    if options["rows"] and any(name not in ("watch", "loss_on") for name in records):
        raise click.UsageError("--rows is for held-out sets alone; --limit is for tasks and code")


def _heldout(run: Path, overrides: tuple[str, ...], rows: int | None, backend: str | None, as_json: bool) -> None:
    from weftrain.analysis.compare.huggingface import revisions_of
    from weftrain.cli.assembly import newest_or_named, open_data, recipe_of_checkpoint
    from weftrain.cli.resolve import backend_options
    from weftrain.core import checkpoint
    from weftrain.core.backend import Job, Plan
    from weftrain.core.errors import DataError
    from weftrain.core.run.prepare import prepare_run

    if revisions_of(run):
        raise DataError(
            f"{run}: a Hugging Face model names no held-out set: give --loss-on, --tasks, --preset or --code"
        )
    console = Console(stderr=as_json)
    path = newest_or_named(run, lambda line: console.print(line))
    state, manifest = checkpoint.load(path, verified=path != run)
    own = [f"log.evaluate_rows={rows or 2**40}", "batch.replicas=1"]
    file = recipe_of_checkpoint(path, manifest, [*overrides, *own], backend, lambda line: console.print(line))
    chosen, options = backend_options(file)
    _, heldout = open_data(file.recipe)
    if not heldout:
        raise DataError(f"{path}: its recipe has no held-out set; prepare the dataset with --heldout-fraction above 0")
    weights = checkpoint.Weights(state.tensors)
    title = f"{path} (step {state.step})"
    lines: list[list[str]] = []
    names: list[str] = []  # of what is measured beside the loss, the same of every set
    rows_to_read = sum(held.num_rows for held in heldout)
    with (
        tempfile.TemporaryDirectory(prefix="weftrain-eval-") as folder,  # for a backend that keeps state on disk
        Bar(Console(stderr=True), "eval, rows", rows_to_read) as bar,
    ):
        prepared = prepare_run(
            chosen,
            Job(
                file.recipe, Plan(state.step, state.step), options, weights, folder=Path(folder), stored_state="replace"
            ),
        )
        done = 0
        for held in heldout:
            result = prepared.evaluate(_CountedRows(held, bar, done))
            done += held.num_rows
            found = result.beside_loss
            names = [name.replace("_", " ") for name in found]
            read = (
                f"all {held.num_rows:,}"
                if held.num_rows == held.rows_available
                else f"{held.num_rows:,} of {held.rows_available:,}"
            )
            if as_json:
                record = {"checkpoint": manifest["root"], "step": state.step, "set": held.name, "loss": result.loss}
                record |= {"rows": held.num_rows, "rows_available": held.rows_available}
                click.echo(json.dumps({**record, **found, "tokens": result.tokens, "dataset_id": held.dataset_id}))
            numbers = [f"{number:,.3f}" for number in found.values()]
            lines.append([held.name, read, f"{result.loss:.4f}", *numbers, f"{result.tokens:,}"])
        prepared.close()
    if not as_json:
        columns = ("rows", "loss", *names, "tokens")
        table = Table(Column("held-out set", overflow="fold"), *columns, title=title, title_justify="left", box=None)
        for line in lines:
            table.add_row(*line)
        console.print(table)


class _CountedRows:
    """A held-out set whose rows are shown on a bar as they are read. See EvaluationSource."""

    def __init__(self, source: EvaluationSource, bar: Bar, before: int) -> None:
        self._source, self._bar, self._before = source, bar, before
        self.name, self.dataset_id = source.name, source.dataset_id
        self.sequence_length = source.sequence_length
        self.num_rows, self.rows_available = source.num_rows, source.rows_available

    def rows(self, first: int, count: int) -> Batch:
        self._bar.update(self._before + min(first + count, self.num_rows), self.name)
        return self._source.rows(first, count)
