"""Base of every schema here, and the number types that schemas share.

A schema is a pydantic model derived from `StrictModel`: nothing is coerced (`"3"` is no number, `3` is no string), an
unknown key is an error, and an instance never changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import Kind, read_plain

# counts are used as floats in places (division, plots), and a float64 holds integers exactly up to here
MAX_COUNT = 1 << 53
PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]  # what every random number generator here accepts
Scalar = bool | int | float | str
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


M = TypeVar("M", bound=BaseModel)


class StrictModel(BaseModel):
    """Strict types, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, in one line: "key 'a.b': what"."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))[:80]
    return f"key '{key}': {first['msg']}" if key else first["msg"]


def validated(model: type[M], value: Any) -> M:
    """`value` as an instance of `model`. Raises ValueError with one line that names the first wrong key."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error


def read_json_model(path: Path, model: type[M], kind: Kind, *, follow: bool = True) -> M:
    """The model that a JSON file holds. Raises ValueError in one line for what is not one, OSError."""
    return validated(model, parse_json(read_plain(path, kind, follow=follow)))
