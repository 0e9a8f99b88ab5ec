"""Which observers follow a run while it trains: its trackers, and what sends its alerts to webhooks.
core/run/observers.py says what an observer is.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weftrain.core.config import Recipe
from weftrain.core.run.observers import Observer, Observers


def observers_of(
    recipe: Recipe,
    folder: Path,
    wait_s: Callable[[], float],
    say: Callable[[str], None],
    also: Sequence[Observer] = (),
) -> Observers:
    """The observers that the recipe asks for, which begin at once, and `also`. wait_s, say: see Observers."""
    from weftrain.analysis.tracking.follower import Follower
    from weftrain.analysis.tracking.observer import TrackingProcess, TrackingThread

    found: list[Observer] = []
    if recipe.log.tensorboard:
        from weftrain.analysis.tracking import tensorboard

        tensorboard.prepare()
        own = tensorboard.TENSORBOARD
        found.append(TrackingThread(own, lambda: Follower(folder, own, tensorboard.TensorBoard()), _later(folder, own)))
    usable = _usable(recipe)
    found += [TrackingProcess(name, folder, _later(folder, name)) for name, problem in usable.items() if not problem]
    if any(rule.webhook_env for rule in recipe.alerts):
        from weftrain.analysis.watch.webhook import WebhookThread, webhooks

        found.append(WebhookThread(folder, webhooks(recipe.alerts, os.environ)))
    return Observers([*found, *also], wait_s, say)


def check_start(recipe: Recipe, run: Path, entries: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """Before anything is prepared: warn of what the run's record and those who read it will lack. entries: of the
    ledger. Raises RecipeError for a webhook without a URL, AlertError where a launcher restarts a halted run.
    """
    from weftrain.cli.launcher import restarted_by_launcher
    from weftrain.core.run.alert_actions import check_not_halted
    from weftrain.core.run.retention_rule import disk_warning

    if any(rule.webhook_env for rule in recipe.alerts):
        from weftrain.analysis.watch.webhook import webhooks

        webhooks(recipe.alerts, os.environ)
    if restarted_by_launcher():
        check_not_halted(entries)
    for warning in (disk_warning(recipe, run), *tracker_problems(recipe, run)):
        if warning:
            say(f"warning: {warning}")


def tracker_problems(recipe: Recipe, folder: Path) -> list[str]:
    """What keeps trackers of the recipe from working here, a line each; the run goes on without them.

    Raises UnknownTrackerError for a name that no package gives.
    """
    return [
        f"tracker {name}: {problem}; {_later(folder, name)}" for name, problem in _usable(recipe).items() if problem
    ]


def _usable(recipe: Recipe) -> dict[str, str]:
    """The trackers besides TensorBoard's thread, and what keeps each from working here; "" for nothing."""
    from weftrain.analysis.tracking.trackers import TENSORBOARD, problem_of

    names = [name for name in recipe.log.trackers if not (name == TENSORBOARD and recipe.log.tensorboard)]
    return {name: problem_of(name) for name in names}


def _later(folder: Path, name: str) -> str:
    from weftrain.cli.display import program

    return f"`{program()} track {shlex.quote(str(folder))} --to {name}` sends what is missing"
