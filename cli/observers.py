"""Which observers follow a run while it trains: its trackers. core/run/observers.py says what an observer is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weftrain.core.config import Recipe
from weftrain.core.run.observers import Observer, Observers


def observers_of(recipe: Recipe, folder: Path, wait_s: Callable[[], float], say: Callable[[str], None]) -> Observers:
    """The observers that the recipe asks for, which begin at once. wait_s, say: see Observers."""
    found: list[Observer] = []
    if recipe.log.tensorboard:
        found.append(_tracker("tensorboard", folder))
    return Observers(found, wait_s, say)


def _tracker(name: str, folder: Path) -> Observer:
    from weftrain.analysis.tracking import tensorboard
    from weftrain.analysis.tracking.follower import Follower
    from weftrain.analysis.tracking.observer import TrackingThread

    tensorboard.prepare()
    retry = "the next start of the run sends what is missing"
    return TrackingThread(name, lambda: Follower(folder, name, tensorboard.TensorBoard()), retry)
