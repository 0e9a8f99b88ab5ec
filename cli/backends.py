"""`weftrain backends`: which backends there are, why one cannot run here, and what to do about it."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from weftrain.cli.display import Bar, Console


@click.group(invoke_without_command=True)
@click.pass_context
def backends(context: click.Context) -> None:
    """List the backends found, with what each is and the reason where it cannot run here."""
    if context.invoked_subcommand is not None:
        return
    from weftrain.backends.common.registry import find_backends, unavailable_reason

    table = Table("backend", "what it is", "here", "options (backend.options)", box=None)
    found = find_backends()
    for name, backend in sorted(found.items()):
        reason = unavailable_reason(backend)
        options = ", ".join(f"{key}={field.default}" for key, field in backend.options.model_fields.items())
        table.add_row(name, backend.summary, "available" if reason is None else reason, options)
    Console(soft_wrap=False).print(table)
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
        f"{name} is ready: cerebras-pytorch {environment.pinned('cerebras-pytorch')} for {made}; next: weftrain lower "
        "crystal_demo"
    )
