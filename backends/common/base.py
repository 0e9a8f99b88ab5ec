"""The base class of a backend, with the protocol's defaults: it runs anywhere and stores no state of its own."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TypeVar

from weftrain.core.backend import Feature, Job, StoredState
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.strict_model import StrictModel

Options = TypeVar("Options", bound=StrictModel)


class PlainBackend:
    portable_options: Set[str] = frozenset()
    unsupported: Set[Feature] = frozenset()

    def unavailable(self) -> str | None:
        return None

    def stored_state(self, recipe: Recipe, options: StrictModel, folder: Path) -> StoredState | None:
        return None


def options_of(job: Job, wanted: type[Options]) -> Options:
    """The job's options. Raises BackendError where they are those of another backend."""
    if not isinstance(job.options, wanted):
        raise BackendError(f"this backend takes {wanted.__name__} and was given {type(job.options).__name__}")
    return job.options
