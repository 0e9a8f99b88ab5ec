"""A data section of two sources, with changes."""

from __future__ import annotations

from typing import Any

from weftrain.core.order.data_section import DataConfig


def config(**changes: Any) -> DataConfig:
    sources = [{"name": "a", "path": "a", "weight": 0.75}, {"name": "b", "path": "b", "weight": 0.25}]
    return DataConfig.model_validate({"sequence_length": 8, "shuffle_seed": 1, "sources": sources} | changes)
