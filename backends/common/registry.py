"""Finds backends: every module or package of this folder that defines `BACKEND`, and the entry points of group
`weftrain.backends`.

A backend that cannot run here is found and listed too, with its reason; `get_backend` refuses it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from weftrain.core.backend import Backend
from weftrain.core.errors import BackendError
from weftrain.kernels.plugins import guarded, load_plugins

ENTRY_POINT_GROUP = "weftrain.backends"


class Backends(dict[str, Backend]):
    """Name -> backend. broken_plugins: entry point -> why it was passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.broken_plugins: dict[str, str] = {}


def find_backends() -> Backends:
    """Every backend by name. A plugin that does not load, or breaks the rules, is passed over and named."""
    found = Backends()
    package = importlib.import_module("weftrain.backends")
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"weftrain.backends.{module.name}")
        if hasattr(loaded, "BACKEND"):
            _add(found, loaded.BACKEND, f"backends/{module.name}")
    for plugin in load_plugins(ENTRY_POINT_GROUP):
        reason = plugin.broken
        if reason is None:
            try:
                _add(found, plugin.loaded, plugin.origin)
            except BackendError as error:
                reason = str(error)
        if reason is not None:
            found.broken_plugins[plugin.origin] = reason
    return found


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises BackendError if there is none, or if it is unavailable here, with its reason."""
    found = find_backends()
    if name not in found:
        near = difflib.get_close_matches(name, found, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        broken = "".join(f"; {origin} was passed over: {reason}" for origin, reason in found.broken_plugins.items())
        raise BackendError(
            f"backend.name: there is no backend '{name}'; {hint}found: {', '.join(sorted(found))}{broken}"
        )
    reason = unavailable_reason(found[name])
    if reason is not None:
        raise BackendError(f"backend '{name}' cannot run here: {reason}")
    return found[name]


def unavailable_reason(backend: Backend) -> str | None:
    """Why it cannot run here; a backend whose own question fails cannot."""
    return guarded(backend.unavailable)()


def _add(found: dict[str, Backend], backend: object, origin: str) -> None:
    if not isinstance(backend, Backend):
        members = (*Backend.__annotations__, *(name for name in vars(Backend) if not name.startswith("_")))
        missing = ", ".join(name for name in members if not hasattr(backend, name))
        raise BackendError(
            f"{origin}: BACKEND lacks {missing} of the protocol in core/backend.py; see backends/README.md"
        )
    if backend.name in found:
        raise BackendError(f"{origin} provides a second backend named '{backend.name}'; rename it")
    found[backend.name] = backend
