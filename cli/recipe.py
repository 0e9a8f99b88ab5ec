"""`weftrain recipe`: a built-in recipe as it is written, with its comments, to copy and change."""

from __future__ import annotations

import click

from weftrain.cli import arguments


@click.command("recipe")
@click.argument("name", required=False, shell_complete=arguments.complete_recipes)
def recipe(name: str | None) -> None:
    """Print the built-in recipe NAME with its comments; without NAME, the names of all.

    Change `name` in the copy: it names the run's folder.

    \b
        weftrain recipe crystal_demo > my.yaml
        weftrain train my.yaml
    """
    from weftrain.core.formats.strict_yaml import read_builtin
    from weftrain.core.recipe_file import builtin_recipes

    if name is None:
        click.echo("\n".join(builtin_recipes()))
    else:
        click.echo(read_builtin("weftrain.core", name), nl=False)
