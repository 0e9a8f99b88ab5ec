"""`weftrain backends`: which backends there are, why one cannot run here, and what their options mean."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Column, Table

from weftrain.cli.arguments import Group
from weftrain.cli.display import Bar, Console, as_called, program


@click.group(cls=Group, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_context
def backends(context: click.Context, as_json: bool) -> None:
    """List the backends found: what each is, why it cannot run here, its options and their meaning.

    \b
    Fields of --json: name, summary, unavailable (null, or the reason), options (name, type, default, meaning).
    """
    if context.invoked_subcommand is not None:
        return
    from weftrain.backends.common.registry import find_backends, unavailable_reason
    from weftrain.cli.reference import keys

    found = find_backends()
    reasons = {name: unavailable_reason(backend) for name, backend in sorted(found.items())}
    if as_json:
        rows = [
            {
                "name": name,
                "summary": found[name].summary,
                "unavailable": reason,
                "options": [key._asdict() for key in keys(found[name].options)],
            }
            for name, reason in reasons.items()
        ]
        click.echo(json.dumps(rows, indent=1))
    else:
        console = Console(soft_wrap=False)
        for name, reason in reasons.items():
            console.print(as_called(f"{name}: {found[name].summary}"), style="bold")
            console.print(f"  {'available' if reason is None else f'not here: {as_called(reason)}'}")
            table = Table(Column(overflow="fold"), Column(), box=None, padding=(0, 2), show_header=False)
            for key in keys(found[name].options):
                meaning = as_called(f"{key.meaning} ({key.type})" if key.meaning else key.type)
                table.add_row(f"{key.name}={key.default}", meaning)
            if table.row_count:
                console.print(table)
        console.print("an option is given as backend.options.NAME=VALUE")
    for origin, reason in found.broken_plugins.items():
        click.echo(f"warning: {origin} was passed over: {reason}", err=True)


@backends.command()
@click.argument("name", type=click.Choice(["cerebras"]))
@click.option("--python", type=click.Path(path_type=Path), help="The CPython 3.11 to use.  [default: found on PATH]")
def setup(name: str, python: Path | None) -> None:
    """Create the separate environment that a backend needs, once, in the user's cache folder."""
    from weftrain.backends.cerebras import environment

    with Bar(Console(stderr=True), f"setting up {name}", 100) as bar:
        made = environment.make(lambda words, share: bar.update(round(100 * share), words), python)
    click.echo(
        f"{name} is ready: cerebras-pytorch {environment.pinned('cerebras-pytorch')} for {made}; next: "
        f"{program()} lower crystal_demo"
    )
