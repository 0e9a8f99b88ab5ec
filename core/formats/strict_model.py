"""Base of every schema here, and the number types that schemas share.

A schema is a pydantic model derived from `StrictModel`: nothing is coerced (`"3"` is no number, `3` is no string), an
unknown key is an error, and an instance never changes.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# counts are used as floats in places (division, plots), and a float64 holds integers exactly up to here
MAX_COUNT = 1 << 53
PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Scalar = bool | int | float | str
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StrictModel(BaseModel):
    """Strict types, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
