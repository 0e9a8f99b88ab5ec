"""Finds backends: every module or package of this folder that defines `BACKEND`, and the entry points of group `weftrain.backends`.

What a reader would get wrong: a backend that cannot run here is still found and listed, with its reason; only `get_backend` refuses it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil

from weftrain.core.backend import Backend
from weftrain.core.errors import BackendError

ENTRY_POINT_GROUP = "weftrain.backends"


def find_backends() -> dict[str, Backend]:
    """Every backend by name. Raises BackendError for two of one name, or an entry point that does not load."""
    found: dict[str, Backend] = {}
    package = importlib.import_module("weftrain.backends")
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"weftrain.backends.{module.name}")
        if hasattr(loaded, "BACKEND"):
            _add(found, loaded.BACKEND, f"backends/{module.name}")
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        origin = f"entry point '{entry_point.name}' ({entry_point.value})"
        try:
            loaded = entry_point.load()
        except (ImportError, AttributeError) as error:
            raise BackendError(f"backend {origin} cannot be loaded: {error}; repair or uninstall the package that provides it") from error
        _add(found, loaded, origin)
    return found


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises BackendError if there is none, or if it is unavailable here, with its reason."""
    found = find_backends()
    if name not in found:
        near = difflib.get_close_matches(name, found, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise BackendError(f"backend.name: there is no backend '{name}'; {hint}found: {', '.join(sorted(found))}")
    reason = found[name].unavailable()
    if reason is not None:
        raise BackendError(f"backend '{name}' cannot run here: {reason}")
    return found[name]


def _add(found: dict[str, Backend], backend: object, origin: str) -> None:
    if not isinstance(backend, Backend):
        raise BackendError(f"{origin}: BACKEND lacks a part of the protocol in core/backend.py; see backends/README.md")
    if backend.name in found:
        raise BackendError(f"{origin} provides a second backend named '{backend.name}'; rename it")
    found[backend.name] = backend
