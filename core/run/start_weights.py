"""Whether a checkpoint's tensors are those of a recipe's model: names, shapes, and the keys that change what the same
tensors compute.

Asked before step 0, from the manifests alone, whatever the backend. What a start may change about the weights of
another run is named by key in `start_from`: `grow` for more rows of the vocabulary, `change` for keys without a shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from weftrain.core.errors import CheckpointError
from weftrain.core.formats.lazy_tensors import LazyTensors, meta, meta_of
from weftrain.core.initialization import draw
from weftrain.core.model_config import ModelConfig
from weftrain.core.model_differences import model_differences
from weftrain.core.parameters import PLANES, ParameterSpec, Role, parameter_specs
from weftrain.core.recipe_file import recorded_recipe

WHOLE_STATE = PLANES


def check_fit(
    manifest: Mapping[str, Any],
    model: ModelConfig,
    where: str,
    planes: Collection[str] = ("weights",),
    grow: Collection[str] = (),
    specs: Sequence[ParameterSpec] | None = None,
) -> None:
    """Compare names, dtypes and shapes of a checkpoint's tensors with the model's. grow: keys in which the model may be
    larger.

    where: names the checkpoint in messages. planes: the part of the state that is used. specs: Recipe.parameters, if
    they are not those of the model alone. Raises CheckpointError with the tensor, both shapes, and the keys of the
    recipe that differ.
    """
    specs = parameter_specs(model) if specs is None else specs
    whole = set(planes) == set(WHOLE_STATE)  # then there may be nothing else either
    tensors = {name: entry for name, entry in manifest["tensors"].items() if whole or name.partition("/")[0] in planes}
    wanted = {f"{plane}/{spec.name}": spec for plane in planes for spec in specs if plane in spec.planes}
    wrong = [
        f"tensor '{name}' of shape {list(spec.shape)} is missing"
        for name, spec in wanted.items()
        if name not in tensors
    ]
    wrong += [
        f"tensor '{name}' of shape {entry['shape']} is not in the model"
        for name, entry in tensors.items()
        if name not in wanted
    ]
    for name, spec in wanted.items():
        if (entry := tensors.get(name)) is not None:
            found = (entry["dtype"], tuple(entry["shape"]))
            grows = "vocab_size" in grow and spec.role in (Role.EMBEDDING, Role.HEAD) and found[1][:1] < spec.shape[:1]
            fits = found[1][1:] == spec.shape[1:] if grows else found[1] == spec.shape
            if not fits or found[0] != "F32":
                wrong.append(f"tensor '{name}' is {found[0]} {list(found[1])}, the model's is F32 {list(spec.shape)}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        keys = (
            "; ".join(_different_keys(manifest, model, where))
            or _different_tuning(manifest, specs)
            or "no key of the model differs from the recorded recipe's"
        )
        raise CheckpointError(
            f"{where}: does not fit the recipe's model: {wrong[0]}{more}; {keys}: give the recipe the model of that "
            "checkpoint"
        )


def check_function(manifest: Mapping[str, Any], model: ModelConfig, where: str, change: Collection[str]) -> list[str]:
    """Refuse weights that the model computes something else with, unless each such key is in `change`. The changes, for
    the user.

    Raises CheckpointError.
    """
    # check_fit's
    sizes = ("vocab_size", "hidden_size", "num_layers", "intermediate_size", "num_kv_heads", "head_dim")
    shaped = (*sizes, "norm", "linear_bias", "qkv_bias", "qk_norm", "feed_forward", "tie_embeddings")
    different = {key: line for key, line in _differences(manifest, model, where).items() if key not in shaped}
    refused = [line for key, line in different.items() if key not in change]
    if refused:
        listed = ", ".join(key for key in different)
        raise CheckpointError(
            f"{where}: the weights were trained for another function of the same shape ({'; '.join(refused)}): give "
            "the recipe that "
            f"checkpoint's model, or change it on purpose with start_from.change=[{listed}]"
        )
    return list(different.values())


def _different_keys(manifest: Mapping[str, Any], model: ModelConfig, where: str) -> list[str]:
    return list(_differences(manifest, model, where).values())


def _different_tuning(manifest: Mapping[str, Any], specs: Sequence[ParameterSpec]) -> str:
    """Says so where the recorded recipe trains other parameters, or has other adapters."""
    recorded = recorded_recipe(dict(manifest["recipe"]), "recipe").recipe.parameters
    return "" if tuple(recorded) == tuple(specs) else "the recorded recipe's tuning is another one"


def _differences(manifest: Mapping[str, Any], model: ModelConfig, where: str) -> dict[str, str]:
    """Key of the model -> "model.key: recorded -> wanted", of the keys that decide shapes or function."""
    recorded = recorded_recipe(dict(manifest["recipe"]), f"{where}: recipe").recipe.model
    return model_differences(recorded, model)


def grown_rows(manifest: Mapping[str, Any], model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Parameter -> rows [first, stop) that the checkpoint's weights do not have and the model does."""
    found = {}
    for spec in parameter_specs(model):
        rows = manifest["tensors"][f"weights/{spec.name}"]["shape"][0]
        if rows < spec.shape[0]:
            found[spec.name] = (rows, spec.shape[0])
    return found


class GrownWeights(LazyTensors):
    """Weights by canonical name, each read when it is asked for; rows that are missing are drawn from the seed."""

    def __init__(
        self, weights: Mapping[str, torch.Tensor], rows: Mapping[str, tuple[int, int]], model: ModelConfig, seed: int
    ) -> None:
        specs = {spec.name: spec for spec in parameter_specs(model)}

        def read(name: str) -> torch.Tensor:
            if name not in rows:
                return weights[name]
            tensor = draw(specs[name], model, seed)
            tensor[: rows[name][0]] = weights[name]
            return tensor

        super().__init__(
            {name: meta(specs[name].shape) if name in rows else meta_of(weights, name) for name in weights}, read
        )
