"""The model that a run began with, for an objective that keeps it (`keeps_first_model`): how it is found again.

Weights that are drawn are drawn again from the seed. Of a run that started from another one's checkpoint, or from a
folder of weights, the run's own checkpoint of step 0 holds them: it is saved before the first step, names by its parent
what it was read from, is in every release, and is not removed by any rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from weftrain.core import checkpoint
from weftrain.core.checkpoint import Weights
from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.run.lineage import Lineage


def saves_first_model(recipe: Recipe) -> bool:
    """Whether a run of this recipe saves the state that it begins with for its objective."""
    return recipe.start_from is not None and recipe.objective.keeps_first_model


def first_weights(recipe: Recipe, line: Lineage, folder: Path) -> Mapping[str, Tensor] | None:
    """Canonical name -> weight of the model that a run which is beyond step 0 began with. None where the objective
    does not keep it, or where they are drawn from the seed.

    folder: the run's or the release's. Raises CheckpointError where the checkpoint of step 0 is not there or not whole.
    """
    if not recipe.objective.keeps_first_model or recipe.start_from is None:
        return None
    path = folder / "checkpoints" / folder_name(0)
    roots = [point.root for point in line.checkpoints if point.step == 0]
    needs = f"objective {recipe.objective.name} reads the model that the run began with"
    if not roots:
        raise CheckpointError(f"{folder}: {needs}, and the ledger has no checkpoint of step 0: begin another run")
    if not path.is_dir():
        raise CheckpointError(f"{path}: is gone, and {needs}: restore it from a copy")
    state, manifest = checkpoint.load(path)
    if manifest["root"] != roots[0]:
        raise CheckpointError(
            f"{path}: is not the checkpoint {roots[0][:12]} of the ledger, and {needs}: restore it from a copy"
        )
    return Weights(state.tensors)
