"""Weights of loss, as records give them: of a text, or of an answer in a conversation."""

from __future__ import annotations

from typing import Any

import numpy as np

from weftrain.core.formats.shard_format import LEAST_WEIGHT, MOST_WEIGHT


def weight_in(where: str, value: Any) -> float:
    """The weight in the field `where` of a record, as float32 has it; 1 for null. Raises ValueError."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"'{where}' holds {type(value).__name__}, not a number: a weight is 0, or {_RANGE}")
    if value != 0 and not LEAST_WEIGHT <= value <= MOST_WEIGHT:
        raise ValueError(f"'{where}' is {str(value)[:20]}: a weight is 0, or {_RANGE}")
    return float(np.float32(value)) + 0.0  # not -0


_RANGE = f"from {LEAST_WEIGHT:f} to {MOST_WEIGHT:,.0f}"
