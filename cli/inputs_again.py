"""`--inputs` of `verify` and `data verify`: datasets are prepared again from their inputs, and compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from weftrain.cli.display import Bar, Console

if TYPE_CHECKING:
    from weftrain.data_prep.again import PreparedAgain

_Command = TypeVar("_Command", bound=Callable[..., Any])


def inputs_options(command: _Command) -> _Command:
    """--inputs and --reading."""
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
    folder: Path, addresses: Sequence[str], reading: Mapping[str, str], shards_here: bool
) -> PreparedAgain:
    """Raises DataError for what does not follow from the inputs."""
    from weftrain.data_prep.again import check_inputs_again
    from weftrain.data_prep.stages.executors import LocalExecutor

    with Bar(Console(stderr=True), f"prepare {folder.name} again", 1) as bar:

        def show(stage: str, done: int, total: int | None, unit: str) -> None:
            bar.update(done, unit, stage, total)

        return check_inputs_again(
            folder, addresses, reading, LocalExecutor(os.cpu_count() or 1), shards_here=shards_here, progress=show
        )
