"""A family of Hugging Face's models: how files name its tensors, how config.json says a model, what it cannot say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_model import first_problem
from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.exchange.config_keys import Part, layer_kinds, pattern
from weftrain.exchange.known_keys import ABSENT, HARMLESS, Keys

EXPERT = "{expert}"  # stands for the number of an expert


@dataclass(frozen=True)
class Names:
    """How files name a model's modules: canonical module -> theirs, within a layer and outside of the layers.

    Canonical modules with one foreign name lie in one tensor along its output axis: side by side, or, by_head, the rows
    of q, k and v of one head after another. A name with EXPERT in it is of each expert's matrix.
    copies: canonical module -> another module under which files repeat it.
    buffers: tensors of a layer that are no weights.
    """

    layers: str
    inner: Mapping[str, str]
    outer: Mapping[str, str]
    copies: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    transposed: bool = False  # linear maps are stored [in, out]
    by_head: bool = False


@dataclass(frozen=True)
class Family:
    """One model_type. fixed: fields of ours that the family's code leaves no choice about. constants: keys of
    config.json that must have this value, written too. parts: the rest, in both directions. defaults: what the config
    class of transformers takes for keys that are missing.
    """

    model_type: str
    architecture: str
    names: Names
    fixed: Mapping[str, Any]
    constants: Mapping[str, Any]
    parts: tuple[Part, ...]
    defaults: Mapping[str, Any]

    @property
    def keys(self) -> set[str]:
        """Every key that is read."""
        return {*self.constants, *(key for part in self.parts for key in part.keys)}

    def read(self, given: Mapping[str, Any]) -> ModelConfig:
        """A parsed config.json as a model. Raises RecipeError."""
        keys, fields = Keys(given, self.defaults), dict(self.fixed)
        for key, value in {**ABSENT, **self.constants}.items():
            if key in self.constants or key not in self.keys:
                keys.require(key, value)
        known = self.keys | HARMLESS | ABSENT.keys()
        for key, value in given.items():
            if value is not None and key not in known and not key.startswith("weftrain_"):
                raise RecipeError(
                    f"config.json: '{key}' is not known for model_type '{self.model_type}', and may change what the "
                    "model computes: take it out if it does not"
                )
        for part in self.parts:
            fields |= part.read(keys)
        try:
            return ModelConfig.model_validate(fields)
        except ValidationError as error:  # of our own field, whose name says which of theirs it is
            raise RecipeError(f"config.json: {first_problem(error)}; is the file damaged?") from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys that say a model, as far as the family can: see `unmet`."""
        found: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture], **self.constants}
        for part in self.parts:
            found |= part.write(config)
        return found

    def unmet(self, config: ModelConfig) -> list[str]:
        """The fields in which this family would compute another function, as 'field: what it needs'."""
        try:
            said = _function(self.read(self.write(config)))
        except RecipeError as error:
            return [str(error).removeprefix("config.json: ").partition(";")[0]]
        return [
            f"{name}: {_plain(said[name])}{_FOLD if name in _FOLDED else ''}"
            for name, value in _function(config).items()
            if not same_value(value, said[name])
        ]


_FOLD = " (see weftrain.exchange.fold_mup.fold)"
_FOLDED = ("embedding_scale", "logits_scale", "attention_scale", "norm_weight_offset")


def _function(config: ModelConfig) -> dict[str, Any]:
    """What decides a model's outputs, muP resolved to the scales that it means and the pattern to its shortest form."""
    names = set(ModelConfig.model_fields) - {"initialization", "mup", "dropout"}
    scales = resolve_scales(config)
    return {name: getattr(config, name) for name in ModelConfig.model_fields if name in names} | {
        "embedding_scale": scales.embedding_scale,
        "logits_scale": scales.logits_scale,
        "layer_pattern": pattern(layer_kinds(config)),
        "experts": None if config.experts is None else config.experts.function,
    }


def config_differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Where two models compute different functions of the same weights, as 'field: ours -> theirs'.

    Initialization, learning-rate multipliers, dropout and the number of allowed positions do not count.
    """
    one, other = _function(ours), _function(theirs)
    return [
        f"{name}: {_plain(value)} -> {_plain(other[name])}"
        for name, value in one.items()
        if name != "max_position_embeddings" and not same_value(value, other[name])
    ]


def same_value(a: Any, b: Any) -> bool:
    """Equal, up to the rounding of a scale that is divided by a width on one side and multiplied on the other."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    return bool(a == b)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):  # kinds of layers
        kinds = [f"window {kind.window or 'none'}, rotary {kind.rotary}" for kind in value]
        return "; ".join(kinds)
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    return value if isinstance(value, str) else json.dumps(value)
