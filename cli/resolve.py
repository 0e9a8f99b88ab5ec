"""Resolves recipe, overrides and --backend to one checked recipe, backend and options.

show, plan, train, bench and lower all use it, so that what one of them computes is what another one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from weftrain.core.config import SHARED_OPTIONS, Recipe
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.formats.strict_yaml import validate
from weftrain.core.recipe_file import RecipeFile, load_recipe, recorded_recipe

if TYPE_CHECKING:
    from weftrain.core.backend import Backend


class Resolved(NamedTuple):
    """A recipe, its backend, and its backend.options checked by the backend's own schema."""

    recipe: Recipe
    backend: Backend
    options: StrictModel


def resolve_recipe(recipe: str, overrides: Iterable[str] = (), backend: str | None = None) -> RecipeFile:
    """The recipe by name or path, with overrides. backend: to use instead of the recipe's.

    Of the recipe's backend.options, another backend keeps those that both declare from core.config.SHARED_OPTIONS.
    Raises RecipeError, BackendError.
    """
    overrides = tuple(overrides)
    if backend is None:
        return load_recipe(recipe, overrides)
    own = load_recipe(recipe, [item for item in overrides if not item.startswith("backend")]).recipe.backend.name
    return load_recipe(recipe, overrides, backend, kept_options(own, backend))


def resolve_recorded(
    tree: Mapping[str, Any], origin: str, overrides: Iterable[str] = (), backend: str | None = None
) -> RecipeFile:
    """The same for a recipe that a checkpoint, release or run's folder records."""
    section = tree.get("backend")
    own = section.get("name") if isinstance(section, Mapping) else None
    kept = kept_options(own, backend) if backend is not None and isinstance(own, str) else ()
    return recorded_recipe(dict(tree), origin, overrides, backend, kept)


def resolve_foreign(
    tree: Mapping[str, Any],
    origin: str,
    overrides: Iterable[str] = (),
    backend: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> RecipeFile:
    """`resolve_recorded` for verbs that compute with a record of unknown origin: replay, eval, generate, memorize.

    It takes only those backend.options that the backend declares portable (`Backend.portable_options`), so that a
    record chooses no path, device or address; overrides may give the others. say: called with what was not taken.
    Raises RecipeError, BackendError.
    """
    from weftrain.backends.common.registry import find_backends

    section = tree.get("backend")
    if isinstance(section, Mapping) and isinstance(options := section.get("options"), Mapping):
        found = find_backends().get(str(section.get("name")))
        portable = frozenset() if found is None else found.portable_options
        left = sorted(set(options) - portable)
        if left and backend in (None, section.get("name")):
            say(
                "not taken from the record, this machine's defaults apply: "
                f"{', '.join(f'backend.options.{name}' for name in left)}"
            )
        tree = {
            **tree,
            "backend": {**section, "options": {name: value for name, value in options.items() if name in portable}},
        }
    return resolve_recorded(tree, origin, overrides, backend)


def resolve(recipe: str, overrides: Iterable[str] = (), backend: str | None = None) -> Resolved:
    """`resolve_recipe`, with the backend and its checked options. Raises RecipeError, BackendError."""
    file = resolve_recipe(recipe, overrides, backend)
    return Resolved(file.recipe, *backend_options(file))


def backend_options(file: RecipeFile) -> tuple[Backend, StrictModel]:
    """The recipe's backend, if it can run here, and its backend.options checked by its own schema. Raises BackendError,
    RecipeError.
    """
    from weftrain.backends.common.registry import get_backend

    config = file.recipe.backend
    backend = get_backend(config.name)
    return backend, validate(
        backend.options, config.options, lambda location: file.at(("backend", "options", *location))
    )


def kept_options(own: str, other: str) -> tuple[str, ...]:
    """The options of backend `own` that mean the same to backend `other`; none where one of them is not installed."""
    from weftrain.backends.common.registry import find_backends

    found = find_backends()
    if own == other or own not in found or other not in found:
        return ()
    both = [
        shared
        for shared in SHARED_OPTIONS
        if issubclass(found[own].options, shared) and issubclass(found[other].options, shared)
    ]
    return tuple(name for shared in both for name in shared.model_fields)
