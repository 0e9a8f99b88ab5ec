"""Entry points of other packages. Whatever one raises when it is imported becomes the reason that it is not used, so
that a broken package does not stop the program.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plugin:
    """One entry point. `loaded` counts only where `broken` is None; else that is why it cannot be used, in one line."""

    name: str
    value: str  # "package.module:attribute"
    loaded: Any
    broken: str | None

    @property
    def origin(self) -> str:
        return f"entry point '{self.name}' ({self.value})"


def load_plugins(group: str) -> Iterator[Plugin]:
    """Every entry point of `group`, loaded."""
    for entry_point in importlib.metadata.entry_points(group=group):
        loaded, broken = None, None
        try:
            loaded = entry_point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, and what panics of compiled extensions are derived from
            broken = f"cannot be loaded: {one_line(error)}; repair or uninstall the package that provides it"
        yield Plugin(entry_point.name, entry_point.value, loaded, broken)


def one_line(error: BaseException) -> str:
    """'ImportError: no module named x', at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def guarded(unavailable: Callable[..., str | None]) -> Callable[..., str | None]:
    """A plugin's `unavailable`, with an exception turned into a reason."""

    def ask(*arguments: Any) -> str | None:
        try:
            return unavailable(*arguments)
        except Exception as error:
            return f"its own `unavailable` failed: {one_line(error)}"

    return ask
