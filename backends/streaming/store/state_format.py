"""State formats: which planes a store keeps of a tile, and what of ordinary training they reproduce exactly. No torch.

A plane is one kind of number for all elements of a tile, such as `exp_avg`; planes.py converts them from and to fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MOMENT_BLOCK = 256  # elements that share one scale in 8-bit moments
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1}

FormatName = Literal["fp32", "split", "bf16_moments", "int8_moments"]


@dataclass(frozen=True)
class Plane:
    """One kind of number of a tile: `dtype`, one for each `elements_per_item` elements."""

    name: str
    dtype: str
    elements_per_item: int = 1

    def bytes(self, elements: int) -> int:
        return elements // self.elements_per_item * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StateFormat:
    """What is kept of a parameter. `exact`: in words, what of ordinary training it reproduces bit for bit."""

    name: FormatName
    exact: str
    split: bool  # a bf16 tile keeps a weight as high plane (bf16) and low plane (the rest of fp32)
    moments: tuple[Plane, ...]

    def planes(self, compute: str) -> tuple[Plane, ...]:
        """Planes, in order, of a tile that computes in `compute`; the first is what forward and backward read."""
        if compute == "float32":
            return (Plane("weights", "float32"), *self.moments)
        if self.split:
            return (Plane("high", "bfloat16"), Plane("low", "int16"), *self.moments)
        return (Plane("copy", "bfloat16"), Plane("weights", "float32"), *self.moments)

    def bytes_per_parameter(self, compute: str) -> float:
        return sum(ITEM_BYTES[plane.dtype] / plane.elements_per_item for plane in self.planes(compute))


_FP32_MOMENTS = (Plane("exp_avg", "float32"), Plane("exp_avg_sq", "float32"))
_BF16_MOMENTS = (Plane("exp_avg", "bfloat16"), Plane("exp_avg_sq", "bfloat16"))
_INT8_MOMENTS = (
    Plane("exp_avg", "int8"),
    Plane("exp_avg_root", "uint8"),  # sqrt(exp_avg_sq): half the exponent range, so that eight bits reach further
    Plane("exp_avg_scale", "float32", MOMENT_BLOCK),
    Plane("exp_avg_root_scale", "float32", MOMENT_BLOCK),
)
_EXACT = "weights, moments and every step, bit for bit"
_TIES = (
    "weights and moments, bit for bit; a bf16 weight exactly between two neighbours rounds away from zero, not to even"
)
_ROUNDED = "weights alone; moments are rounded to {} at each update"
FORMATS: dict[str, StateFormat] = {
    "fp32": StateFormat("fp32", _EXACT, False, _FP32_MOMENTS),
    "split": StateFormat("split", _TIES, True, _FP32_MOMENTS),
    "bf16_moments": StateFormat("bf16_moments", _ROUNDED.format("bf16"), True, _BF16_MOMENTS),
    "int8_moments": StateFormat("int8_moments", _ROUNDED.format("8 bits"), True, _INT8_MOMENTS),
}
