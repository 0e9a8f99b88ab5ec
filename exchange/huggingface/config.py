"""The config.json of a Hugging Face folder from and to a ModelConfig, for the families of exchange/families.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weftrain.core.errors import CheckpointError, RecipeError
from weftrain.core.model_config import ModelConfig
from weftrain.exchange.families import FAMILIES
from weftrain.exchange.layouts import check_fit

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")


def layout_of(config: ModelConfig) -> str:
    """The model_type that a model is exported as: the first family that computes the same function.

    Raises CheckpointError naming what the family that comes nearest lacks.
    """
    unmet = {}
    for name, family in FAMILIES.items():
        unmet[name] = family.unmet(config)
        if not unmet[name]:
            return name

    def distance(name: str) -> tuple[bool, int]:
        compared = unmet[name][0].partition(":")[0] in ModelConfig.model_fields
        return not compared, len(unmet[name])

    nearest = min(unmet, key=distance)
    raise CheckpointError(
        f"no family of Hugging Face can hold this model; '{nearest}' comes nearest, which needs "
        f"{'; '.join(unmet[nearest])}"
    )


def config_from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """A parsed config.json as a ModelConfig.

    Raises RecipeError naming the key that is missing, is not known, or asks for something this decoder does not do.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        experts = next((key for key in _EXPERTS if config.get(key)), None)
        what = "" if experts is None else f", a mixture of experts ({experts}: {config[experts]!r:.40}),"
        raise RecipeError(
            f"config.json: model_type {model_type!r:.80}{what} is not one that converts; there is {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type].read(config)


def config_to_huggingface(config: ModelConfig, model_type: str | None = None) -> dict[str, Any]:
    """The config.json keys that let Hugging Face code compute this model; `config_from_huggingface` reads them back.

    model_type: the family to write; by default that of `layout_of`. Standard deviations are carried as one
    initializer_range, and not at all for CrystalCoder. Raises CheckpointError.
    """
    model_type = layout_of(config) if model_type is None else model_type
    check_fit(config, model_type)
    return FAMILIES[model_type].write(config)
