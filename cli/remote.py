"""Runs by address: `s3://bucket/runs/name` wherever a verb takes the folder of a run, a checkpoint or a release, and
`train --runs s3://bucket/runs`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weftrain.cli.arguments import NamedPath, complete_runs
from weftrain.cli.display import show_as
from weftrain.exchange.remote.store import is_address

if TYPE_CHECKING:
    from weftrain.core.run.observers import Observer
    from weftrain.exchange.remote.staging import Staged

_OPENED = "weftrain.opened"  # in a context's meta: the addresses by the local folder they are opened as


class RunPath(NamedPath):
    """The folder of a run, a checkpoint or a release, or its address, which is opened until the verb ends.

    changes: the verb changes a run, and the address follows when it ends. here: the verb takes no address.
    """

    def __init__(self, *, changes: bool = False, here: bool = False, **options: Any) -> None:
        super().__init__(path_type=Path, **options)
        self._changes, self._here = changes, here

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not is_address(value):
            return super().convert(value, param, ctx)
        if ctx is None:  # not a verb: nothing is opened
            return Path(value)
        if self._here:
            self.fail(f"'{value}' is an address, and this verb changes folders of this machine only")
        from weftrain.exchange.remote.opening import opened
        from weftrain.exchange.remote.staging import changed

        opening = changed(value, lambda line: click.echo(line, err=True)) if self._changes else opened(value)
        folder = ctx.with_resource(opening)
        show_as(str(folder), value.rstrip("/"))  # also in an error that is shown when the context has ended
        ctx.meta.setdefault(_OPENED, {})[folder] = value
        return folder


def is_opened(folder: Path) -> bool:
    """Whether a folder that a verb was given is only the local picture of an address."""
    context = click.get_current_context(silent=True)
    return context is not None and folder in context.meta.get(_OPENED, {})


run = click.argument("run", type=RunPath(exists=True), shell_complete=complete_runs)


class RunsPath(click.Path):
    """The folder that holds run folders, or an address."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_address(value) else super().convert(value, param, ctx)


def runs_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where a run is trained."""
    runs = click.option(
        "--runs",
        type=RunsPath(path_type=Path),
        default=Path("runs"),
        show_default=True,
        metavar="FOLDER",
        help="Folder that holds run folders, or an address such as s3://bucket/runs.",
    )
    staging = click.option(
        "--staging",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="With an address: the local folder that the run trains in.  [default: one in the user's cache]",
    )
    keep = click.option(
        "--staging-keep",
        "keep",
        type=click.IntRange(min=2),
        default=4,
        show_default=True,
        metavar="N",
        help="With an address: whole checkpoints that stay in the local folder.",
    )
    return runs(staging(keep(command)))


class RunsPlace:
    """Where a run is trained. runs: the local folder of run folders. address: what that is the staging folder of, or
    None. options: by which another start names the same place.
    """

    def __init__(self, runs: Path | str, staging: Path | None, keep: int) -> None:
        self.address = runs if isinstance(runs, str) else None
        self._keep = keep
        self._staged: Staged | None = None
        if self.address is None:
            if staging is not None:
                raise click.UsageError("--staging has no effect without an address for --runs")
            self.runs = Path(runs)
            self.options: tuple[str, ...] = () if self.runs == Path("runs") else ("--runs", str(self.runs))
            return
        from weftrain.exchange.remote.staging import staging_folder

        self.runs = staging_folder(self.address) if staging is None else staging
        self.options = ("--runs", self.address, *(() if staging is None else ("--staging", str(staging))))

    def open(self, name: str, *, leads: bool, say: Callable[[str], None]) -> None:
        """Bring the local folder up to the run at the address. leads: also copy it there from now on, which no other
        process may, until the verb ends. Raises RemoteError, RunFolderError.
        """
        from weftrain.exchange.remote.staging import pull, staged
        from weftrain.exchange.remote.store import Store

        if self.address is None:
            return
        if leads:
            context = click.get_current_context()
            self._staged = context.with_resource(staged(self.address, name, self.runs, self._keep, say))
        else:
            pull(Store(f"{self.address.rstrip('/')}/{name}"), self.runs / name, lambda line: None)

    def observers(self, stopped: Callable[[], bool]) -> list[Observer]:
        """What copies the run to its address while it trains. stopped: whether the run is asked to end."""
        return [] if self._staged is None else [self._staged.observer(stopped)]
