"""`weftrain safety`: what checkpoints say of toxic text, write after loaded prompts, and know of hazardous subjects.

A verb of its own beside `eval`, since it takes any number of models and answers with one table; its scores are records
as those of `eval` are, and are read by `report`, `compare` and model cards like them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from weftrain.cli.arguments import NamedPath, complete_runs
from weftrain.cli.display import Bar, Console
from weftrain.cli.remote import RunPath

if TYPE_CHECKING:
    from weftrain.analysis.evaluation.records import EvaluationSettings
    from weftrain.analysis.safety.suite import SafetySuite
    from weftrain.analysis.safety.table import Column, SafetyTable
    from weftrain.cli.evaluated import Evaluated


@click.command()
@click.argument(
    "models", nargs=-1, required=True, type=RunPath(exists=True), metavar="A [B]...", shell_complete=complete_runs
)
@click.option("--sets", required=True, type=NamedPath(path_type=Path), help="Folder of the sets: see docs/safety.md.")
@click.option("--analyses", help="Analyses, separated by commas.  [default: those whose sets are there]")
@click.option(
    "--classifier",
    metavar="FOLDER|NAME",
    help="Judge of toxigen's continuations: a Hugging Face folder, or an entry point of weftrain.classifiers.",
)
@click.option("--every-checkpoint", is_flag=True, help="Of a run, all its checkpoints instead of the newest.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Rows of each set.  [default: 1,024 of toxicity detection, else all]"
)
@click.option(
    "--tokenizer", type=NamedPath(path_type=Path), help="tokenizer.json of all models.  [default: each's own]"
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences in a batch.")
@click.option("--seed", type=click.IntRange(min=0), default=1234, show_default=True, help="Seed of sampling.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--to", type=click.Path(path_type=Path), help="Folder for safety.json and safety.md.")
@click.option("--json", "as_json", is_flag=True, help="Print safety.json instead of the table.")
def safety(models: tuple[Path, ...], **options: Any) -> None:
    """Analyse the safety of A, B, ... side by side: runs, checkpoints, and models or series of Hugging Face.

    Each score becomes a record in RUN/analyses/evaluations, and an existing record is not computed again. Nothing is
    downloaded: sets and classifier are files of yours.
    """
    from weftrain.analysis.safety.tasks import stay_local

    stay_local()  # before anything imports the libraries that it is for
    from weftrain.analysis.safety import table as tables
    from weftrain.analysis.safety.suite import open_suite
    from weftrain.core.formats import fsops
    from weftrain.core.formats.canonical import canonical_json

    console = Console(stderr=options["as_json"])
    settings = _settings(options)
    names = [name.strip() for name in options["analyses"].split(",")] if options["analyses"] is not None else None
    suite = open_suite(options["sets"], names, options["classifier"], settings)
    for line in suite.left_out:
        console.print(f"left out  {line}")
    console.print(f"on {settings.device} in {settings.precision}, {settings.batch_size} sequences at once")
    columns = [
        _column(name, opened, suite, settings, console)
        for name, opened in _opened(models, settings, options["tokenizer"], options["every_checkpoint"], console)
    ]
    found = tables.table_of(columns)
    data = canonical_json(tables.as_json(found))
    if options["as_json"]:
        click.echo(data.decode())
    else:
        _show(found, console)
    if (to := options["to"]) is not None:
        fsops.make_dirs(to)
        fsops.write_bytes(to / "safety.json", data + b"\n")
        fsops.write_bytes(to / "safety.md", tables.as_markdown(found).encode())
        console.print(f"written   {to / 'safety.json'}\nwritten   {to / 'safety.md'}")


def _settings(options: dict[str, Any]) -> EvaluationSettings:
    import torch

    from weftrain.analysis.evaluation.records import EvaluationSettings

    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return EvaluationSettings(options["batch_size"], options["seed"], options["limit"], options["precision"], device)


def _opened(
    models: tuple[Path, ...], settings: EvaluationSettings, tokenizer: Path | None, every: bool, console: Console
) -> Iterator[tuple[str, Evaluated]]:
    """Each checkpoint with its name, one open at a time. Raises WeftrainError."""
    from weftrain.analysis.compare.huggingface import revisions_of
    from weftrain.analysis.compare.table import names_of
    from weftrain.cli.assembly import newest_or_named
    from weftrain.cli.evaluated import Revision, RunCheckpoint
    from weftrain.core.formats.checkpoint_manifest import STEP_FOLDER

    for path, name in zip(models, names_of(models), strict=True):
        if revisions := revisions_of(path):
            for step, folder in revisions.items():
                shown = name if len(revisions) == 1 else f"{name}, step {step}"
                yield shown, Revision(folder, step, settings, tokenizer)
            continue
        kept = path / "checkpoints"
        if every and kept.is_dir():
            folders = sorted(one for one in kept.iterdir() if STEP_FOLDER.fullmatch(one.name))
        else:
            folders = [newest_or_named(path, lambda line: console.print(line))]
        for folder in folders:
            opened = RunCheckpoint(folder, (), settings, tokenizer, verified=folder != path and not every)
            yield f"{name}, step {opened.step}", opened


def _column(name: str, opened: Evaluated, suite: SafetySuite, settings: EvaluationSettings, console: Console) -> Column:
    from weftrain.analysis.evaluation.records import EvaluatedCheckpoint, records_folder
    from weftrain.analysis.safety.table import Column
    from weftrain.analysis.safety.texts import TextModel
    from weftrain.cli.evaluated import lm_of
    from weftrain.core.formats.tokenizer_file import panics_refused

    with Bar(console, name, 1) as bar, panics_refused(str(opened.tokenizer_file[0])):
        tokenizer, sha256, eos_id = opened.tokenizer
        model = TextModel(
            lambda: opened.generator,
            tokenizer,
            eos_id,
            opened.config.max_position_embeddings,
            settings.batch_size,
            settings.seed,
            lambda done, total, what: bar.update(done, what, total=total),
        )
        subject = EvaluatedCheckpoint(opened.root, opened.step, sha256)
        found = suite.records(
            subject, model, lambda: lm_of(opened, settings, bar), records_folder(opened.path), bar.say
        )
    return Column(name, opened.root, opened.step, tuple(found))


def _show(found: SafetyTable, console: Console) -> None:
    from weftrain.analysis.safety.table import cells

    head, *rows = cells(found)
    table = Table(*head, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
