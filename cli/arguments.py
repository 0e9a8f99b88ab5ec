"""Arguments and options that several verbs share, each with its completion in the shell.

A verb writes `@recipe`, `@overrides` or `@runs_folder`, or `@remote.run` (cli/remote.py), where it would write click's
decorator.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from weftrain.core.formats.likely_paths import did_you_mean

FETCH = "copy the dataset here with `weftrain data fetch`, and name its folder"  # an address in place of a dataset


class NamedPath(click.Path):
    """The path of something that is there; a misspelt one is answered with its likest neighbours, an address with the
    verbs that take one, or with `remedy`.
    """

    def __init__(self, *, remedy: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._remedy = remedy or (
            "`log` and `report` read a run by its address; for anything else copy it here first, as with `aws s3 sync`"
        )

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(f"'{value}' is an address, and this verb looks at folders of this machine: {self._remedy}")
        if hint := did_you_mean(Path(value)):
            self.fail(f"'{value}' is not there; {hint}")
        return super().convert(value, param, ctx)


class Group(click.Group):
    """Verbs under a verb; a misspelt one is answered with its likest, or with all."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            like = difflib.get_close_matches(error.command_name, self.list_commands(ctx), 1)
            meant = f"did you mean '{like[0]}'? " if like else ""
            ctx.fail(f"no '{error.command_name}'; {meant}there is {', '.join(self.list_commands(ctx))}")


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
runs_folder = click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder that holds run folders.",
)
