"""`weftrain prep`: text in, packed and hashed shards out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from weftrain.cli.display import Bar, Console
from weftrain.core.errors import DataError

if TYPE_CHECKING:
    from weftrain.data_prep.executors import Executor
    from weftrain.data_prep.plan import Inputs
    from weftrain.data_prep.prep_recipe import PrepRecipe
    from weftrain.data_prep.quality import Quality

STAGES = ("sample", "tokenize", "merge", "order", "write", "finish")


@dataclass(frozen=True)
class _Job:
    """One dataset to make: its inputs and the arguments of prepare(). json_texts: names of JSON files that are read as text."""

    inputs: Inputs
    arguments: dict[str, Any]
    json_texts: tuple[str, ...] = ()


@click.command()
@click.argument("inputs", nargs=-1)
@click.option("--output", default="datasets", show_default=True, help="Folder of datasets, or an fsspec address to copy them to.")
@click.option("--name", help="Name of the dataset's folder.  [default: python_stdlib without INPUTS, else needed]")
@click.option("--inputs", "root", help="Of a recipe: the folder or address that holds its inputs and its tokenizer.")
@click.option("--only", multiple=True, help="Of a recipe: only the dataset of this name (repeatable).")
@click.option("--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Of a recipe: lay a value over it (repeatable).")
@click.option("--grow", type=click.Path(path_type=Path), help="A dataset that INPUTS are added to, in a folder of its own, --name.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="A tokenizer.json, or a SentencePiece .model.  [default: a byte-level BPE trained on the text]",
)
@click.option("--vocab-size", type=click.IntRange(min=300), help="Ids of the trained tokenizer, 32 specials apart.  [default: 8192]")
@click.option("--eos", help="The tokenizer's end-of-document token, or none.  [default: </s> or <|endoftext|>]")
@click.option("--bos", help="The tokenizer's token to put before each document, such as <s>.  [default: none]")
@click.option("--engine", type=click.Choice(["auto", "tokenizers", "gigatoken"]), default="auto", show_default=True, help="Who encodes.")
@click.option("--sequence-length", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a row.")
@click.option("--packing", type=click.Choice(["concatenate", "best_fit"]), default="concatenate", show_default=True, help="Rows of what.")
@click.option(
    "--order",
    type=click.Choice(["shuffled", "as_read"]),
    default="shuffled",
    show_default=True,
    help="Of documents; as read: duplicates stay.",
)
@click.option("--fim-rate", type=float, help="Share of documents that are turned into fill-in-the-middle.  [default: none]")
@click.option("--fim-spm-share", type=float, default=0.5, show_default=True, help="Of those, how many suffix first.")
@click.option(
    "--fim-mode",
    type=click.Choice(["exact", "context", "released"]),
    default="exact",
    show_default=True,
    help="exact: whole documents, context: their pieces in each row, released: as CrystalCoder's scripts.",
)
@click.option(
    "--fim-tokens",
    metavar="PREFIX,MIDDLE,SUFFIX[,PAD]",
    help="The tokenizer's control tokens of fill-in-the-middle.  [default: <|fim_prefix|> or <fim_prefix> and so on]",
)
@click.option("--epochs", type=click.IntRange(min=1), default=1, show_default=True, help="How often each document comes, FIM drawn anew.")
@click.option("--chunks", type=click.IntRange(min=1), help="Equal chunks of the training rows.")
@click.option("--global-batch-size", type=click.IntRange(min=1), help="Of the run to come: makes each chunk whole steps.")
@click.option("--heldout-fraction", type=float, default=0.02, show_default=True, help="Share of documents that are held out.")
@click.option("--rows-per-shard", type=click.IntRange(min=1), help="[default: 64 MiB of tokens]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the order of documents and of FIM.")
@click.option("--text-key", default="text", show_default=True, help="The field of a .jsonl line or Parquet row that holds the text.")
@click.option("--source-key", help="The field that names a document's source.  [default: the folder's or file's name]")
@click.option("--tokens-key", help="The field of tokenised records that holds the ids.  [default: tokens, input_ids, or the only one]")
@click.option(
    "--tokens-dtype",
    type=click.Choice(["uint16", "uint32", "int32", "int64"]),
    help="Of ids that do not say theirs (.npy, MDS bytes).  [default: by the vocabulary; MDS: int64]",
)
@click.option(
    "--suffix", "suffixes", multiple=True, help="Of a folder, only names that end so, as .jsonl.gz (repeatable).  [default: all text]"
)
@click.option(
    "--format",
    "format_",
    help="What the files are, where it cannot be told: jsonl, json, text, parquet …; a wrong name lists all.",
)
@click.option("--normalise", multiple=True, help="NFC, NFKC, newlines, strip_bom, in this order (repeatable).  [default: nothing]")
@click.option("--max-failures", type=click.IntRange(min=0), default=0, show_default=True, help="Documents that may be unreadable.")
@click.option("--licence", default="not stated", show_default=True, help="The licence of INPUTS, for the manifest.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one a core]")
@click.option("--executor", type=click.Choice(["local", "task", "ray"]), default="local", show_default=True, help="Who does the tasks.")
@click.option("--index", type=click.IntRange(min=0), help="Of a task: which member of the array this is, from 0.")
@click.option("--of", type=click.IntRange(min=1), help="Of a task: how many members the array has.")
@click.option("--stage", type=click.Choice(STAGES), help="Of a task: do this stage only and stop.")
@click.option("--ray-address", help="Of ray: the cluster's address.  [default: one is started here]")
def prep(inputs: tuple[str, ...], output: str, **options: Any) -> None:
    """Prepare datasets. INPUTS: files, folders, patterns, `-` (.jsonl, .gz, .zst, Parquet, text, tokenised), or one preparation recipe.

    Without INPUTS: the embedded corpus, the Python standard library of the interpreter that runs this (licence PSF-2.0), no download.
    Run again with the same inputs it says that the dataset is up to date; interrupted, it goes on where it was.
    """
    from weftrain.data_prep.files import local_path
    from weftrain.data_prep.prep_recipe import is_prep_recipe, load_prep_recipe
    from weftrain.data_prep.publish import is_remote, staging_folder
    from weftrain.data_prep.standard_input import forget

    console = Console(highlight=False, soft_wrap=True)
    output = local_path(output)
    executor = _executor(options, output)
    folder = staging_folder(output) if is_remote(output) else Path(output)
    if len(inputs) == 1 and is_prep_recipe(inputs[0]):
        if options["grow"] is not None:
            raise click.UsageError("--grow adds files to a dataset: name the files, not a recipe")
        recipe = load_prep_recipe(inputs[0], options["overrides"])
        jobs = _recipe_jobs(recipe, options, console)
        if (quality := recipe.quality) is not None:
            jobs = [_filtered(job, quality, folder, options["workers"] or os.cpu_count() or 1, console) for job in jobs]
        for job in jobs:
            _make(job, folder, output, executor, options["stage"], console)
        return
    try:
        _make(_job(inputs, options, folder, console), folder, output, executor, options["stage"], console)
    finally:
        if options["name"] is not None:
            forget(folder, options["name"])


def _make(job: _Job, folder: Path, output: str, executor: Executor, stage: str | None, console: Console) -> None:
    """Make one dataset in `folder`, say what became of it, and copy it to `output` where that is an address."""
    from weftrain.cli.prep_report import report
    from weftrain.data_prep.pipeline import prepare
    from weftrain.data_prep.publish import is_remote, publish

    _say_what_is_text(console, job)
    with Bar(console, f"prep {job.arguments['name']}", 1) as bar:
        prepared = prepare(job.inputs, folder, **job.arguments, executor=executor, only_stage=stage, progress=_shown(bar))
    if prepared is None:
        console.print(f"dataset {folder / job.arguments['name']}: this member's share is done")
        return
    report(console, prepared, tuple(job.inputs.skipped))
    if is_remote(output):
        address = f"{output.rstrip('/')}/{job.arguments['name']}"
        publish(prepared.folder, prepared.manifest, address)
        console.print(f"  copied   to {address}")


def _say_what_is_text(console: Console, job: _Job) -> None:
    """Before the work begins, so that whoever meant records can stop it."""
    if job.json_texts:
        names = ", ".join(job.json_texts[:4]) + (", …" if len(job.json_texts) > 4 else "")
        key = job.inputs.options.text_key
        console.print(
            f"JSON without a field {key!r} is read as text, a file a document ({len(job.json_texts):,}): {names}; where it holds records, "
            "name their field with --text-key"
        )


def _job(inputs: tuple[str, ...], options: dict[str, Any], folder: Path, console: Console) -> _Job:
    from weftrain.data_prep.corpus import embedded_inputs
    from weftrain.data_prep.listing import STANDARD_INPUT, Wanted, find_inputs
    from weftrain.data_prep.markers import fim_names
    from weftrain.data_prep.plan import Inputs

    for option in ("root", "only", "overrides"):
        if options[option]:
            raise click.UsageError(f"--{'inputs' if option == 'root' else 'set' if option == 'overrides' else option} belongs to a recipe")
    if inputs and options["name"] is None:
        raise click.UsageError("give the dataset a --name")
    _refuse_without_inputs(inputs)
    if options["grow"] is not None:
        options = _of_parent(options)
    read = _read_options(options)
    json_texts: tuple[str, ...] = ()
    if inputs:
        spooled = _standard_input(inputs, options, folder)
        with Bar(console, "list", 1) as bar:
            wanted = Wanted(inputs, None, options["suffixes"], options["format_"], read.text_key)
            listed = find_inputs([wanted], spooled, lambda count: bar.note(f"{count:,} files"))
        json_texts = listed.json_texts
        names = ", ".join("stdin" if address in STANDARD_INPUT else address.rstrip("/").rpartition("/")[2] for address in inputs)
        chosen = Inputs(listed.files, names, options["licence"], read, skipped=listed.skipped)
    else:
        embedded, description, licence = embedded_inputs()
        chosen = Inputs(tuple(embedded), description, licence, read)
    same = ("tokenizer", "vocab_size", "eos", "bos", "engine", "sequence_length", "heldout_fraction", "rows_per_shard", "seed", "packing")
    arguments = {key: options[key] for key in (*same, "order", "epochs", "chunks", "global_batch_size", "max_failures", "grow")}
    arguments["fim_tokens"] = fim_names(options["fim_tokens"])
    arguments["fim"] = _fim(options["fim_rate"], options["fim_spm_share"], options["fim_mode"])
    return _Job(chosen, arguments | {"name": options["name"] or "python_stdlib"}, json_texts)


def _standard_input(inputs: tuple[str, ...], options: dict[str, Any], folder: Path) -> Path | None:
    """The file that holds standard input, where it is one of the inputs."""
    from weftrain.data_prep.listing import STANDARD_INPUT
    from weftrain.data_prep.standard_input import spool

    count = sum(address in STANDARD_INPUT for address in inputs)
    if not count:
        return None
    if count > 1:
        raise click.UsageError("standard input is named twice: it can be read once")
    if options["executor"] == "task":
        raise click.UsageError("--executor task: each member would read a standard input of its own; write it to a file first")
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError(
            "standard input is closed or a terminal: pipe the text in, as in `zcat t.jsonl.gz | weftrain prep - --name x`"
        )
    return spool(sys.stdin.buffer, folder, options["name"])


def _of_parent(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the settings of the dataset that grows, but for those that the command gives: they must be equal."""
    from weftrain.data_prep.growth import parents_options

    context = click.get_current_context()
    found = {
        key: value
        for key, value in parents_options(options["grow"]).items()
        if key in options and context.get_parameter_source(key) is not ParameterSource.COMMANDLINE
    }
    if "normalise" in found:
        found["normalise"] = tuple(filter(None, str(found["normalise"] or "").split(",")))
    for key in ("fim_spm_share", "fim_mode"):  # which have a value also where no FIM is asked for
        if found.get(key) is None:
            found.pop(key, None)
    return options | found


def _refuse_without_inputs(inputs: tuple[str, ...]) -> None:
    """Options that say what INPUTS are mean nothing for the embedded corpus."""
    context = click.get_current_context()
    of_inputs = {
        "licence": "--licence",
        "text_key": "--text-key",
        "source_key": "--source-key",
        "suffixes": "--suffix",
        "format_": "--format",
        "tokens_key": "--tokens-key",
        "tokens_dtype": "--tokens-dtype",
    }
    for option, shown in of_inputs.items():
        if not inputs and context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{shown} says what INPUTS are: name them, or leave it out for the embedded corpus")


def _recipe_jobs(recipe: PrepRecipe, options: dict[str, Any], console: Console) -> list[_Job]:
    """The recipe's datasets, or those named by --only. Options that the recipe decides are refused."""
    from weftrain.data_prep.listing import Wanted, find_inputs
    from weftrain.data_prep.plan import Inputs

    context = click.get_current_context()
    decided = [
        option
        for option in context.params
        if option not in ("inputs", "output", "root", "only", "overrides", "workers", "executor", "index", "of", "stage", "ray_address")
        and context.get_parameter_source(option) is ParameterSource.COMMANDLINE
    ]
    if decided:
        raise click.UsageError(f"the recipe decides {decided[0]}: lay a value over it with --set KEY.SUB=VALUE")
    unknown = set(options["only"]) - {dataset.name for dataset in recipe.datasets}
    if unknown:
        known = ", ".join(dataset.name for dataset in recipe.datasets)
        raise click.UsageError(f"--only {min(unknown)}: the recipe makes {known}")
    root = options["root"]
    jobs = []
    for dataset in recipe.datasets:
        if options["only"] and dataset.name not in options["only"]:
            continue
        sections = [
            Wanted(
                tuple(_below(root, address) for address in section.addresses),
                section.source,
                section.suffixes,
                section.format,
                recipe.text_key,
            )
            for section in dataset.inputs
        ]
        with Bar(console, f"list {dataset.name}", 1) as bar:
            listed = find_inputs(sections, progress=lambda count, bar=bar: bar.note(f"{count:,} files"))  # type: ignore[misc]
        read = replace(
            _read_options(options),
            text_key=recipe.text_key,
            source_key=recipe.source_key,
            tokens_key=recipe.tokens_key,
            tokens_dtype=recipe.tokens_dtype,
            normalise=recipe.normalise,
            sequence_length=recipe.sequence_length,
        )
        same = (
            "vocab_size",
            "eos",
            "bos",
            "fim_tokens",
            "engine",
            "sequence_length",
            "heldout_fraction",
            "rows_per_shard",
            "seed",
            "packing",
            "order",
            "max_failures",
        )
        arguments = {key: getattr(recipe, key) for key in same}
        arguments |= {
            "name": dataset.name,
            "tokenizer": None if recipe.tokenizer is None else Path(_below(root, recipe.tokenizer)),
            "epochs": dataset.epochs,
            "chunks": None if dataset.chunks is None else dataset.chunks.count,
            "global_batch_size": None if dataset.chunks is None else dataset.chunks.global_batch_size,
            "fim": dataset.fim,
        }
        description = f"{recipe.name}: {dataset.name}"
        licence = dataset.licence or recipe.licence
        chosen = Inputs(listed.files, description, licence, read, skipped=listed.skipped)
        jobs.append(_Job(chosen, arguments, listed.json_texts))
    return jobs


def _filtered(job: _Job, quality: Quality, folder: Path, workers: int, console: Console) -> _Job:
    """The job over what the recipe's filters leave, which stays beside the dataset: its lines say where each document came from."""
    from weftrain.data_prep.datatrove_bridge import filter_inputs

    target = folder / f"{job.arguments['name']}.filtered"
    filtered = filter_inputs(job.inputs, quality, target, workers)
    counts = ", ".join(f"{step} {count:,}" for step, count in filtered.dropped.items())
    console.print(f"filtered {job.arguments['name']}: dropped by {counts}; what is left lies in {target}", markup=False)
    return replace(job, inputs=filtered.inputs)


def _below(root: str | None, address: str) -> str:
    if "://" in address or os.path.isabs(address):
        return address
    if root is None:
        raise click.UsageError(f"the recipe names {address!r}: say with --inputs which folder or address holds it")
    return f"{root.rstrip('/')}/{address}"


def _read_options(options: dict[str, Any]) -> Any:
    from weftrain.data_prep.read_options import ReadOptions

    return ReadOptions(
        text_key=options["text_key"],
        source_key=options["source_key"],
        normalise=tuple(options["normalise"]),
        sequence_length=options["sequence_length"],
        tokens_key=options["tokens_key"],
        tokens_dtype=options["tokens_dtype"],
    )


def _fim(rate: float | None, spm_share: float, mode: Any) -> Any:
    from weftrain.core.config import Fim

    if rate is None:
        return None
    if not 0 < rate <= 1 or not 0 <= spm_share <= 1:
        raise DataError(f"fim: rate {rate} must lie in (0, 1] and the SPM share {spm_share} in [0, 1]")
    return Fim(rate=rate, spm_share=spm_share, mode=mode)


def _executor(options: dict[str, Any], output: str) -> Executor:
    from weftrain.data_prep.executors import LocalExecutor, RayExecutor, TaskExecutor
    from weftrain.data_prep.publish import is_remote

    kind = options["executor"]
    if kind != "local" and is_remote(output):
        raise click.UsageError(f"--executor {kind}: --output must be a folder that all of them see; copy the dataset from there")
    if kind != "task" and (options["index"] is not None or options["of"] is not None or options["stage"] is not None):
        raise click.UsageError("--index, --of and --stage belong to --executor task")
    if kind != "ray" and options["ray_address"] is not None:
        raise click.UsageError("--ray-address belongs to --executor ray")
    if kind == "task":
        if options["index"] is None or options["of"] is None:
            raise click.UsageError("--executor task needs --index and --of")
        return TaskExecutor(options["index"], options["of"])
    if kind == "ray":
        return RayExecutor(options["ray_address"], options["workers"])
    return LocalExecutor(options["workers"] or os.cpu_count() or 1)


def _shown(bar: Bar) -> Callable[[str, int, int | None, str], None]:
    """Progress in megabytes with their rate, where a stage counts bytes."""
    began: dict[str, tuple[float, int]] = {}

    def show(stage: str, done: int, total: int | None, unit: str) -> None:
        start, first = began.setdefault(stage, (time.monotonic(), done))
        if unit.startswith("bytes"):
            seconds = max(time.monotonic() - start, 1e-9)
            note = f"MB{unit.removeprefix('bytes')}, {(done - first) / 1e6 / seconds:,.1f} MB/s"
            bar.update(done // 1_000_000, note, stage, None if total is None else max(1, total // 1_000_000))
        else:
            bar.update(done, unit, stage, total)

    return show
