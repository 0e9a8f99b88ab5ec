"""The result of a step as JSON values, for a backend that keeps it with the state that the step made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from weftrain.core.backend import StepResult


def result_json(result: StepResult) -> dict[str, Any]:
    """A step's result as JSON values; a number that is not finite as a string."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        number = float(value)
        return number if math.isfinite(number) else str(number)

    return {name: plain(value) for name, value in vars(result).items()}


def result_from_json(values: Mapping[str, Any] | None) -> StepResult | None:
    if values is None:
        return None
    measures = {name: float(value) for name, value in values.get("measures", {}).items()}
    numbers = {name: float(values[name]) for name in ("loss", "grad_norm")}
    return StepResult(**{**values, **numbers, "measures": measures})
