"""Arguments and options that several verbs share, each with its completion in the shell.

A verb writes `@recipe`, `@overrides`, `@run` or `@runs_folder` where it would write click's decorator.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem


class NamedPath(click.Path):
    """The path of something that is there; a misspelt one is answered with its likest neighbours."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if not os.path.lexists(path):
            with contextlib.suppress(OSError):
                names = difflib.get_close_matches(path.name, os.listdir(path.parent))
                if names:
                    self.fail(
                        f"'{path}' is not there; did you mean {' or '.join(str(path.parent / n) for n in names)}?"
                    )
        return super().convert(value, param, ctx)


def complete_recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from weftrain.core.recipe_file import builtin_recipes

    found = [CompletionItem(name) for name in builtin_recipes() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def complete_runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from weftrain.core.run.run_folder import RECIPE

    found = [CompletionItem(str(path.parent)) for path in sorted(Path("runs").glob(f"*/{RECIPE}"))]
    return [item for item in found if item.value.startswith(incomplete)] or [CompletionItem(incomplete, type="dir")]


def complete_keys(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from weftrain.cli.reference import recipe_keys

    return [CompletionItem(f"{key}=", help=words) for key, words in recipe_keys() if key.startswith(incomplete)]


recipe = click.argument("recipe", shell_complete=complete_recipes)
overrides = click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...", shell_complete=complete_keys)
run = click.argument("run", type=NamedPath(path_type=Path), shell_complete=complete_runs)
runs_folder = click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder that holds run folders.",
)
