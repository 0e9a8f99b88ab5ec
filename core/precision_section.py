"""The recipe's section `precision`: what is computed in, and what its bits may depend on."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from weftrain.core.formats.strict_model import PositiveInt, StrictModel
from weftrain.core.model_config import ModelConfig


class PrecisionConfig(StrictModel):
    """Weights and optimizer state are fp32 always; `compute` is what forward and backward run in, with fp32 reductions.

    numerics: `replayable` adds the micro-batches' gradients in a fixed tree, so that the bits do not depend on backend,
    layout or number of processes (docs/same-bits.md).
    """

    compute: Literal["float32", "bfloat16"]
    numerics: Literal["fast", "replayable"] = "fast"
    # numerics: replayable: parts, 1, 2, 4 .., in which a block's linear maps are computed by every layout, so that
    # tensor-parallel ranks, of which the number divides it, have the bits of one process
    tensor_parts: PositiveInt = 1

    @model_validator(mode="after")
    def _check(self) -> PrecisionConfig:
        parts = self.tensor_parts
        if parts & (parts - 1):
            raise ValueError(
                f"tensor_parts {parts} is no power of two, and what the parts give is added in pairs: set it to "
                f"{1 << (parts.bit_length() - 1)}"
            )
        if parts > 1 and self.numerics == "fast":
            raise ValueError(f"tensor_parts {parts} needs numerics: replayable: set that, or tensor_parts to 1")
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the later key at its default: a recipe that does not use it has the hash it had before."""
        found = handler(self)
        return {key: value for key, value in found.items() if (key, value) != ("tensor_parts", 1)}


def check_parts(config: ModelConfig, parts: int, adapters: bool, compiled: bool) -> None:
    """Raises ValueError, with the key and the remedy, for a model that is not computed in so many parts."""
    if parts == 1:
        return
    if compiled:
        raise ValueError(
            f"precision.tensor_parts is {parts} and backend.options.compile true: what a compiler fuses depends on how "
            "many parts a process computes: set compile=false"
        )
    if config.experts is not None:
        raise ValueError(
            "precision.tensor_parts and model.experts: experts are not computed in parts: set tensor_parts=1"
        )
    if adapters:
        raise ValueError(
            "precision.tensor_parts and tuning.lora: adapters are not computed in parts: set tensor_parts=1"
        )
    if config.qk_norm == "full":
        raise ValueError(
            f"precision.tensor_parts is {parts} and model.qk_norm full, whose statistics are of the queries of all "
            "parts: set model.qk_norm=per_head, or precision.tensor_parts=1"
        )
    numbers = {name: getattr(config, name) for name in ("num_heads", "num_kv_heads", "intermediate_size")}
    largest = math.gcd(parts, *numbers.values())
    for name, number in numbers.items():
        if number % parts:
            raise ValueError(
                f"model.{name} {number} is no multiple of precision.tensor_parts {parts}: set tensor_parts={largest}, "
                f"or another model.{name}"
            )
