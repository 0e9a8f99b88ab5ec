"""`weftrain track`: send a run to an experiment tracker afterwards, or what of it is missing there."""

from __future__ import annotations

from pathlib import Path

import click

from weftrain.cli.arguments import NamedPath
from weftrain.cli.display import Console


@click.command("track")
@click.argument("run", type=NamedPath(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--to",
    "names",
    required=True,
    multiple=True,
    metavar="TRACKER",
    help="tensorboard, wandb, mlflow, or one that another package gives (repeatable).",
)
def track(run: Path, names: tuple[str, ...]) -> None:
    """Send RUN to a tracker: what is missing there, which of a new one is everything.

    A run does it by itself while it trains where its recipe has log.trackers. Each tracker's state in RUN/tracking says
    what it has, so that the same command again sends nothing twice.
    """
    from weftrain.analysis.tracking.follower import Follower
    from weftrain.analysis.tracking.observer import words
    from weftrain.analysis.tracking.tracker import TrackerError
    from weftrain.analysis.tracking.trackers import find_tracker
    from weftrain.core.errors import WeftrainError
    from weftrain.core.run.run_folder import stored_recipe

    console = Console()
    stored_recipe(run)  # which a folder that is no run's does not have
    trackers = {name: find_tracker(name) for name in names}
    for name, tracker in trackers.items():
        if problem := tracker.problem():
            raise TrackerError(f"tracker {name}: {problem}")
        follower = Follower(run, name, tracker)
        try:
            follower.advance()
            follower.close()
        except WeftrainError as error:
            raise TrackerError(f"tracker {name}: {error}") from error
        except Exception as error:  # of any library
            raise TrackerError(
                f"tracker {name}: {words(error)}: the same command again sends what is missing"
            ) from error
        console.print(f"{name}: {follower.records:,} records sent; the tracked run is {follower.id}")
        if follower.damaged:
            console.print(f"warning: {follower.damaged} damaged lines of metrics.jsonl were passed over")
