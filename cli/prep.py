"""`weftrain prep`: text in, packed and hashed shards out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weftrain.cli.display import Bar, Console
from weftrain.cli.prep_jobs import PrepJob, filtered, job_of_options, jobs_of_recipe
from weftrain.cli.prep_options import GROUPS, GroupedCommand
from weftrain.core.formats.units import gb

if TYPE_CHECKING:
    from weftrain.data_prep.stages.executors import Executor


@click.command(
    cls=GroupedCommand,
    params=[click.Argument(["inputs"], nargs=-1), *(option for options in GROUPS.values() for option in options)],
)
def prep(inputs: tuple[str, ...], output: str, **options: Any) -> None:
    """Prepare datasets from INPUTS: files, folders, patterns, addresses (s3://…), `-`; or one preparation recipe.

    Text, JSON, Parquet, Arrow and WARC are encoded; token files of Megatron, MDS, litdata, OLMo, datatrove and Cerebras
    keep their ids.

    Without INPUTS: the Python standard library of the interpreter that runs this (licence PSF-2.0), no download.
    A second run with the same inputs reports that the dataset is up to date; an interrupted run resumes.
    """
    from weftrain.data_prep.inputs.files import local_path
    from weftrain.data_prep.inputs.standard_input import forget
    from weftrain.data_prep.prep_recipe import is_prep_recipe, load_prep_recipe
    from weftrain.data_prep.publish import check_address, is_remote, staging_folder

    console = Console()
    if not output.strip():
        raise click.UsageError(
            f"--output is {output!r}, as a variable of the shell is that is not set: name the folder of datasets"
        )
    output = local_path(output)
    if is_remote(output):
        check_address(output)
    executor = _executor(options, output)
    folder = staging_folder(output) if is_remote(output) else Path(output)
    if len(inputs) == 1 and is_prep_recipe(inputs[0]):
        if options["grow"] is not None:
            raise click.UsageError("--grow adds files to a dataset: name the files, not a recipe")
        recipe = load_prep_recipe(inputs[0], options["overrides"])
        jobs = jobs_of_recipe(recipe, options, console)
        if (quality := recipe.quality) is not None:
            jobs = [filtered(job, quality, folder, options["workers"] or os.cpu_count() or 1, console) for job in jobs]
        for job in jobs:
            _make(job, folder, output, executor, options["stage"], console)
        return
    try:
        _make(job_of_options(inputs, options, folder, console), folder, output, executor, options["stage"], console)
    finally:
        if options["name"] is not None:
            forget(folder, options["name"])


def _make(job: PrepJob, folder: Path, output: str, executor: Executor, stage: str | None, console: Console) -> None:
    """Make one dataset in `folder`, report on it, and copy it to `output` if that is an address."""
    from weftrain.cli.prep_report import report
    from weftrain.data_prep.pipeline import prepare
    from weftrain.data_prep.publish import is_remote, publish

    _say_what_is_text(console, job)
    with Bar(console, f"prep {job.name}", 1) as bar:
        prepared = prepare(
            job.inputs, folder, **job.arguments, executor=executor, only_stage=stage, progress=_shown(bar)
        )
    if prepared is None:
        console.print(f"dataset {folder / job.name}: this member's share is done")
        return
    report(console, prepared, tuple(job.inputs.skipped))
    if is_remote(output):
        address = f"{output.rstrip('/')}/{job.name}"
        publish(prepared.folder, prepared.manifest, address)
        console.print(f"  copied   to {address}")


def _say_what_is_text(console: Console, job: PrepJob) -> None:
    """Announce JSON that is read as text before the work begins, so that the user can stop it."""
    if job.json_texts:
        names = ", ".join(job.json_texts[:4]) + (", …" if len(job.json_texts) > 4 else "")
        key = job.inputs.options.text_key
        console.print(
            f"JSON without a field {key!r} is read as text, a file a document ({len(job.json_texts):,}): {names}; "
            "where it holds records, name their field with --text-key"
        )


def _executor(options: dict[str, Any], output: str) -> Executor:
    from weftrain.data_prep.publish import is_remote
    from weftrain.data_prep.stages.executors import LocalExecutor, RayExecutor, TaskExecutor

    kind = options["executor"]
    if kind != "local" and is_remote(output):
        raise click.UsageError(
            f"--executor {kind}: --output must be a folder that all of them see; copy the dataset from there"
        )
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
    return LocalExecutor(options["workers"] or os.cpu_count() or 1, sparing=options["workers"] is None)


def _shown(bar: Bar) -> Callable[[str, int, int | None, str], None]:
    """Progress, in GB and GB/s for a stage that counts bytes."""
    began: dict[str, tuple[float, int]] = {}

    def show(stage: str, done: int, total: int | None, unit: str) -> None:
        start, first = began.setdefault(stage, (time.monotonic(), done))
        if unit.startswith("bytes"):
            seconds = max(time.monotonic() - start, 1e-9)
            note = f"{unit.removeprefix('bytes').lstrip(', ')}, {gb((done - first) / seconds)}/s".lstrip(", ")
            bar.update(done, note, stage, total, sizes=True)
        else:
            bar.update(done, unit, stage, total)

    return show
