"""Whether a module of another package is there, asked without importing anything of it."""

from __future__ import annotations

import importlib.machinery
import importlib.util


def installed(module: str) -> bool:
    """Whether "package.folder.module" can be found. Its packages may be imported already, and are not for this."""
    first, *rest = module.split(".")
    try:
        found = importlib.util.find_spec(first)
    except ValueError:  # a module somebody put into sys.modules without a __spec__
        return False
    name = first
    for leaf in rest:
        if found is None:
            return False
        name = f"{name}.{leaf}"
        found = importlib.machinery.PathFinder.find_spec(name, found.submodule_search_locations)
    return found is not None
