"""What the verbs of `weftrain kernels` share: options, tables at full width, and the process that interprets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.table import Table

from weftrain.cli.display import Bar, Console, this_program

DTYPES = ("float32", "bfloat16", "float16")
OPS = click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op (repeatable).")
SOURCES = click.option("--source", "sources", multiple=True, metavar="SOURCE", help="Only this source (repeatable).")
DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device type."
)
FILE = click.Path(dir_okay=False, path_type=Path)
JSON = click.option("--json", "json_path", type=FILE, metavar="FILE", help="File for the result.")


def print_table(table: Table) -> None:
    """Print at full width: columns cut to the terminal, or to 80 characters in a pipe, would lose figures."""
    measuring = Console(width=10_000)
    Console(soft_wrap=False, width=measuring.measure(table).maximum).print(table, crop=False)


def progress(bar: Bar) -> Callable[[int, int, str], None]:
    return lambda done, total, note: bar.update(done, note, total=max(total, 1))


def repeated(**values: Sequence[str]) -> list[str]:
    """ops=("a", "b") -> --op a --op b."""
    return [
        part for name, given in values.items() for value in given for part in (f"--{name.removesuffix('s')}", value)
    ]


def interpreted(verb: str, options: Sequence[str], json_path: Path | None) -> int:
    """Run this command in a process whose Triton interprets, and return its exit code."""
    command = this_program("kernels", verb, *options, *(["--json", str(json_path)] if json_path else []))
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode


def mend_the_interpreter() -> None:
    """Where Triton interprets, correct its bfloat16 arithmetic before anything is run."""
    from weftrain.kernels.triton_version import why_not_triton

    if why_not_triton() is not None:
        return
    import triton

    if triton.knobs.runtime.interpret:
        from weftrain.kernels.checks.interpreter import install

        install()
