"""Which trackers there are: those of this package, and the entry points `weftrain.trackers` of others.

An entry point gives a class or function without arguments that makes a `Tracker`. Its name is what `log.trackers` and
`weftrain track --to` call it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from weftrain.analysis.tracking.tracker import Tracker, TrackerError, one_line

ENTRY_POINT_GROUP = "weftrain.trackers"
TENSORBOARD = "tensorboard"


def _tensorboard() -> Tracker:
    from weftrain.analysis.tracking.tensorboard import TensorBoard

    return TensorBoard()


def _wandb() -> Tracker:
    from weftrain.analysis.tracking.weights_and_biases import WeightsAndBiases

    return WeightsAndBiases()


def _mlflow() -> Tracker:
    from weftrain.analysis.tracking.mlflow import MLflow

    return MLflow()


_OWN: dict[str, Callable[[], Tracker]] = {TENSORBOARD: _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def find_tracker(name: str) -> Tracker:
    """The tracker of this name. Raises TrackerError if there is none, or if its package is broken."""
    if name in _OWN:
        return _OWN[name]()
    # Not kernels/plugins.py: it imports torch, which takes seconds and memory in each tracker's process.
    found = {entry_point.name: entry_point for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        raise UnknownTrackerError(
            f"there is no tracker '{name}': there are {', '.join([*_OWN, *sorted(found)])}; others come with packages "
            f"that have an entry point in the group {ENTRY_POINT_GROUP}"
        )
    try:
        made: Tracker = found[name].load()()
    except Exception as error:
        raise TrackerError(
            f"entry point '{name}' ({found[name].value}) failed: {_words(error)}: repair or uninstall the package that "
            "provides it"
        ) from error
    return made


class UnknownTrackerError(TrackerError):
    """No package gives a tracker of this name."""


def problem_of(name: str) -> str:
    """What keeps the tracker of this name from working here, in a line; "" for nothing. Raises UnknownTrackerError."""
    try:
        return find_tracker(name).problem()
    except UnknownTrackerError:
        raise
    except TrackerError as error:
        return str(error)
    except Exception as error:
        return f"failed: {_words(error)}"


def _words(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
