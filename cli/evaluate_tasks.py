"""Scores of `weftrain eval` that are kept as records: lm-eval tasks, generated programs, and --watch.

cli/evaluated.py opens a checkpoint, whose weights are read only if a record is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from weftrain.analysis.evaluation.records import EvaluatedCheckpoint, EvaluationRecord, EvaluationSettings
from weftrain.analysis.evaluation.tasks import PRESETS, TaskRequest
from weftrain.cli.display import Bar, Console
from weftrain.cli.evaluated import Evaluated, Revision, RunCheckpoint, lm_of
from weftrain.core.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from weftrain.core.config import Recipe
    from weftrain.core.model import Decoder


def evaluate_records(run: Path, overrides: Sequence[str], options: dict[str, Any]) -> None:
    """Run the verb. options: the command's, already checked. Raises WeftrainError."""
    from weftrain.analysis.compare.huggingface import check_no_overrides, revisions_of
    from weftrain.analysis.evaluation.watcher import watch
    from weftrain.cli.assembly import newest_or_named

    console = Console(stderr=options["as_json"])
    settings = settings_from(options)
    console.print(f"on {settings.device} in {settings.precision}, {settings.batch_size} sequences at once")

    def say(line: str) -> None:
        console.print(line)

    from weftrain.cli.evaluate_side import SideEvaluations

    side = SideEvaluations(run, settings, say)
    follows = options["watch"] and not any(options[name] for name in ("tasks", "preset", "code", "loss_on"))
    recipes: list[Recipe] = []  # of the checkpoints that had evaluations on the side, the newest last

    def evaluate(path: Path, verified: bool = False) -> None:
        opened = RunCheckpoint(path, overrides, settings, options["tokenizer"], verified)
        if follows and side.of(opened.recipe):
            recipes.append(opened.recipe)
            with Bar(console, f"step {opened.step}", 1) as bar:
                records = side.records(opened, lambda settings: lm_of(opened, settings, bar))
        else:
            records = records_of(opened, settings, options, console)
        _show(records, opened, options["as_json"], console)

    if options["watch"]:
        if not (run / "checkpoints").is_dir():
            raise CheckpointError(
                f"{run}: no run folder, it has no 'checkpoints'; start the run first, or leave --watch out"
            )
        steps = watch(run, evaluate, every_seconds=options["every_seconds"], until_step=options["until_step"], say=say)
        say(f"watched to the end: {len(steps)} checkpoints")
        if recipes:
            side.enter(recipes[-1])
        return
    if revisions := revisions_of(run):
        check_no_overrides(run, overrides)
        for step, folder in revisions.items():
            revision = Revision(folder, step, settings, options["tokenizer"])
            _show(records_of(revision, settings, options, console), revision, options["as_json"], console)
        return
    path = newest_or_named(run, say)
    evaluate(path, verified=path != run)


def settings_from(options: dict[str, Any]) -> EvaluationSettings:
    import torch

    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return EvaluationSettings(
        options["batch_size"], options["seed"], options["limit"], options["precision"], device, options["include"]
    )


def _requests(options: dict[str, Any]) -> list[TaskRequest]:
    named = [name.strip() for name in (options["tasks"] or "").split(",") if name.strip()]
    return [
        *(PRESETS[options["preset"]] if options["preset"] else ()),
        *(TaskRequest(name, options["shots"]) for name in named),
    ]


def records_of(
    opened: Evaluated,
    settings: EvaluationSettings,
    options: dict[str, Any],
    console: Console,
    folder: Path | None = None,
) -> list[EvaluationRecord]:
    """Every requested score of one checkpoint: read from its record, or computed and recorded. folder: of the records,
    if not that of the run.
    """
    from weftrain.analysis.evaluation.heldout import attend_within_documents, run_heldout
    from weftrain.analysis.evaluation.records import records_folder
    from weftrain.analysis.evaluation.tasks import run_tasks
    from weftrain.core.formats.tokenizer_file import panics_refused

    folder, requests = records_folder(opened.path) if folder is None else folder, _requests(options)
    records: list[EvaluationRecord] = []
    with Bar(console, f"step {opened.step}", 1) as bar:
        if requests:
            subject = EvaluatedCheckpoint(opened.root, opened.step, opened.tokenizer[1])
            with panics_refused(str(opened.tokenizer_file[0])):
                model = functools.partial(lm_of, opened, settings, bar)
                records += run_tasks(requests, subject, settings, model, folder, bar.say)
        if options["code"]:
            with panics_refused(str(opened.tokenizer_file[0])):
                records.append(_code(opened, settings, options, folder, bar))
        if options["loss_on"] or not (requests or options["code"]):
            sets, within_documents = opened.heldout(options["loss_on"], options["rows"])

            def decoder() -> Decoder:
                if within_documents:
                    attend_within_documents(opened.decoder)
                return opened.decoder

            subject = EvaluatedCheckpoint(opened.root, opened.step)
            records += run_heldout(sets, subject, settings, decoder, folder, bar.say, opened.objective)
    return records


def _code(
    opened: Evaluated, settings: EvaluationSettings, options: dict[str, Any], folder: Path, bar: Bar
) -> EvaluationRecord:
    from weftrain.analysis.evaluation.code import CodeSettings, run_code

    try:
        ks = tuple(int(k) for k in options["ks"].split(","))
    except ValueError:
        raise DataError(f"--k {options['ks']}: whole numbers with commas between them, e.g. --k 1,10") from None
    code = CodeSettings(options["samples"], ks, options["temperature"], options["top_p"], options["max_new_tokens"])
    tokenizer, sha256, eos_id = opened.tokenizer
    return run_code(
        options["code"],
        code,
        EvaluatedCheckpoint(opened.root, opened.step, sha256),
        settings,
        tokenizer,
        eos_id,
        opened.config.max_position_embeddings,
        lambda: opened.generator,
        folder,
        bar.say,
        lambda done, total: bar.update(done, "programs tested", total=total),
    )


def _show(records: Sequence[EvaluationRecord], opened: Evaluated, as_json: bool, console: Console) -> None:
    from weftrain.core.formats.canonical import canonical_json

    if as_json:
        for record in records:
            click.echo(canonical_json(record).decode())
        return
    title = f"{opened.path} (step {opened.step})"
    table = Table("task", "shots", "metric", "score", "± error", "of", title=title, title_justify="left", box=None)
    published = sorted({name for record in records for name in record.get("published_percent", {})})
    for name in published:
        table.add_column(f"{name}, published")
    for record in records:
        percent, error = record["value_percent"], record["stderr_percent"]
        score = f"{percent:.2f} %" if percent is not None else _shown(record["value"])
        deviation = (
            f"{error:.2f}" if error is not None else ("" if record["stderr"] is None else f"{record['stderr']:.4g}")
        )
        count = f"{record['samples']:,}" + (
            f" of {record.get('samples_available', 'more'):,}" if record.get("partial") else ""
        )
        others = [_shown(record.get("published_percent", {}).get(name, "")) for name in published]
        table.add_row(record["task"], str(record["shots"]), record["metric"], score, deviation, count, *others)
    console.print(table)


def _shown(value: Any) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
