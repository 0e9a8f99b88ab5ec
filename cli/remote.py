"""Runs by address: `s3://bucket/runs/name` wherever a verb takes the folder of a run, a checkpoint or a release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weftrain.cli.arguments import NamedPath, complete_runs
from weftrain.cli.display import show_as
from weftrain.exchange.remote.store import is_address

_OPENED = "weftrain.opened"  # in a context's meta: the addresses by the local folder they are opened as


class RunPath(NamedPath):
    """The folder of a run, a checkpoint or a release, or its address, which is opened until the verb ends.

    writes: the verb changes the run, and its changes go to the address when it ends.
    """

    def __init__(self, *, writes: bool = False, **options: Any) -> None:
        super().__init__(path_type=Path, **options)
        self._writes = writes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not is_address(value) or ctx is None:
            return super().convert(value, param, ctx)
        if self._writes:
            self.fail(f"'{value}' is an address, and this verb changes folders of this machine only")
        from weftrain.exchange.remote.opening import opened

        folder = ctx.with_resource(opened(value))
        show_as(str(folder), value.rstrip("/"))  # also in an error that is shown when the context has ended
        ctx.meta.setdefault(_OPENED, {})[folder] = value
        return folder


def is_opened(folder: Path) -> bool:
    """Whether a folder that a verb was given is only the local picture of an address."""
    context = click.get_current_context(silent=True)
    return context is not None and folder in context.meta.get(_OPENED, {})


run = click.argument("run", type=RunPath(exists=True), shell_complete=complete_runs)
