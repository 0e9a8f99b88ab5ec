"""`weftrain backends`: which backends there are, and why one cannot run here."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table


@click.command()
def backends() -> None:
    """List the backends found, with what each is and the reason where it cannot run here."""
    from weftrain.backends.registry import find_backends

    table = Table("backend", "what it is", "here", "options (backend.options)", box=None)
    for name, backend in sorted(find_backends().items()):
        reason = backend.unavailable()
        options = ", ".join(f"{key}={field.default}" for key, field in backend.options.model_fields.items())
        table.add_row(name, backend.summary, "available" if reason is None else reason, options)
    Console(highlight=False).print(table)
