"""`--inputs` of `verify` and `data verify`: datasets are prepared again from their inputs, and compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from weftrain.cli.display import Bar, Console

if TYPE_CHECKING:
    from weftrain.data_prep.again import PreparedAgain, Sample

_SHOWN = 16  # names of shards
_Command = TypeVar("_Command", bound=Callable[..., Any])


def inputs_options(command: _Command) -> _Command:
    """--inputs, --reading, --sample and --seed."""
    command = click.option("--seed", type=int, default=0, show_default=True, help="Seed of --sample.")(command)
    command = click.option(
        "--sample",
        "share",
        type=float,
        metavar="P",
        help="With --inputs: only this random share of the shards, e.g. 0.1, at least one of each dataset.",
    )(command)
    command = click.option(
        "--reading",
        multiple=True,
        metavar="KEY=VALUE",
        help="With --inputs: how `weftrain prep` was told to read them, such as text_key=content (repeatable).",
    )(command)
    return click.option(
        "--inputs",
        multiple=True,
        metavar="[NAME=]PATH",
        help="What the dataset NAME was prepared from, files, a folder, an address or `embedded`: prepares it again "
        "and compares every shard (repeatable).",
    )(command)


def parsed_sample(share: float | None, seed: int, inputs: Sequence[str]) -> Sample | None:
    """Which shards are compared; None: all."""
    from weftrain.data_prep.again import Sample

    if share is None:
        return None
    if not inputs:
        raise click.UsageError("--sample has no effect without --inputs")
    return Sample(share, seed)


def parsed_reading(reading: Sequence[str], inputs: Sequence[str]) -> dict[str, str]:
    if reading and not inputs:
        raise click.UsageError("--reading has no effect without --inputs")
    found = {}
    for one in reading:
        key, equals, value = one.partition("=")
        if not equals or key in found:
            raise click.UsageError(f"--reading {one}: give each once, as KEY=VALUE, such as text_key=content")
        found[key] = value
    return found


def prepared_again(
    folder: Path, addresses: Sequence[str], reading: Mapping[str, str], sample: Sample | None, shards_here: bool
) -> PreparedAgain:
    """Raises DataError for what does not follow from the inputs."""
    from weftrain.data_prep.again import check_inputs_again
    from weftrain.data_prep.stages.executors import LocalExecutor

    with Bar(Console(stderr=True), f"prepare {folder.name} again", 1) as bar:

        def show(stage: str, done: int, total: int | None, unit: str) -> None:
            bar.update(done, unit, stage, total)

        return check_inputs_again(
            folder,
            addresses,
            reading,
            LocalExecutor(os.cpu_count() or 1, sparing=True),
            sample=sample,
            shards_here=shards_here,
            progress=show,
        )


def words_of(found: Mapping[str, PreparedAgain], sample: Sample | None) -> str:
    """What was compared, for datasets by their names ('' alone), in one line."""
    each = found.values()
    files, documents = sum(one.files for one in each), sum(one.documents for one in each)
    shards, told = sum(len(one.shards) for one in each), sum(one.told_sources for one in each)
    words = f"{shards:,} shards made again from {files:,} files, {documents:,} documents: the same bytes"
    if sample is not None:
        names = [f"{name}/{shard}".lstrip("/") for name, one in found.items() for shard in one.shards]
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
        total = sum(one.num_shards for one in each)
        words = (
            f"covered for {shards:,} of {total:,} shards, seed {sample.seed} ({shown}): {documents:,} documents of "
            f"{files:,} files are in them as they say"
        )
    return words + (f"; the names of sources of {told:,} files are the dataset's word" if told else "")
