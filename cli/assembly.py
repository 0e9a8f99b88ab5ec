"""What several verbs put together alike: the backend with its checked options, the data, the peak.

What a reader would get wrong: everything here fails before step 0. A wrong option names its line in the recipe, a missing shard its file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weftrain.analysis.peak import Peak, measured_matmul_peak
from weftrain.backends.registry import get_backend
from weftrain.core.backend import Backend, BatchSource, EvaluationSource, Run
from weftrain.core.config import Recipe, Section
from weftrain.core.recipe_file import RecipeFile, validate_section


def backend_options(file: RecipeFile) -> tuple[Backend, Section]:
    """The recipe's backend, and its backend.options checked by the backend's own schema. Raises BackendError, RecipeError."""
    config = file.recipe.backend
    backend = get_backend(config.name)
    options = validate_section(backend.options, config.options, lambda location: file.at(("backend", "options", *location)))
    return backend, options


def open_data(recipe: Recipe) -> tuple[BatchSource, Sequence[EvaluationSource]]:
    """The training rows and the held-out sets of a recipe. Raises DataError."""
    from weftrain.core.data import open_heldout, training_source

    source = training_source(recipe)
    return source, open_heldout(recipe.data, recipe.model.vocab_size, recipe.log.evaluate_rows)


def measured_peak(recipe: Recipe, backend: Backend, run: Run) -> Peak:
    """The matrix-multiply peak of the devices that the run is on, in its compute dtype; unknown for a backend that computes nothing."""
    if not backend.trains:
        return Peak(None, f"the {backend.name} backend does not compute here")
    fingerprint = run.fingerprint()
    peak = measured_matmul_peak(torch.device(fingerprint["device_type"]), getattr(torch, recipe.precision.compute))
    return peak.of(fingerprint.get("ranks", 1))
