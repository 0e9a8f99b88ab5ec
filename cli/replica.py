"""`weftrain replica`: join a run that another process leads. Ctrl-C and SIGTERM leave it between two steps."""

from __future__ import annotations

from pathlib import Path

import click

from weftrain.cli.display import Console
from weftrain.core.formats.likely_paths import did_you_mean
from weftrain.core.recipe_file import RecipeFile, recorded_recipe


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[backend.options.KEY=VALUE]...")
@click.option(
    "--wait",
    "wait_s",
    type=click.IntRange(min=0),
    default=600,
    show_default=True,
    help="Seconds to wait for admission.",
)
def replica(run: Path, overrides: tuple[str, ...], wait_s: int) -> None:
    """Join the run in folder RUN as one more replica. It may be started before the run.

    Only backend.options may differ on this machine, e.g. backend.options.threads=8.
    """
    import time

    from weftrain.cli.assembly import open_data
    from weftrain.cli.resolve import backend_options
    from weftrain.core.backend import Follower, Job, Plan
    from weftrain.core.errors import BackendError
    from weftrain.core.run.run_folder import LOCK, asked_recipe
    from weftrain.core.stop import StopRequest

    wrong = [item for item in overrides if not item.startswith("backend.options.")]
    if wrong:
        raise click.BadParameter(f"'{wrong[0]}': a replica has the run's recipe; only backend.options may differ here")
    deadline = time.monotonic() + wait_s
    if hint := did_you_mean(run):  # it may come yet
        click.echo(f"waiting for {run}, which is not there; {hint}", err=True)

    def file() -> RecipeFile:
        while (asked := asked_recipe(run)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if asked is None:
            raise BackendError(
                f"{run}: no run there after {wait_s} s: start it first, with batch.replicas=N or "
                "backend.options.open_to_replicas=true"
            )
        return recorded_recipe(asked, f"{run / LOCK}: recipe", overrides)

    stop = StopRequest()

    def read() -> Job:
        found = file()
        return Job(found.recipe, Plan(0, found.recipe.schedule.steps), backend_options(found)[1], folder=run, stop=stop)

    backend, _ = backend_options(file())
    if not isinstance(backend, Follower):
        raise BackendError(f"the {backend.name} backend has no replicas that join: --backend streaming does")
    console = Console()
    console.print(f"joining {run}")
    with stop:
        backend.run_worker(read, lambda job: open_data(job.recipe)[0], wait_s)
    console.print("left the run" if stop.requested() else "the run ended")
