"""What is known of a state that lies in the memory of several nodes (memory_copies.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Claims:
    """What a copy says of the state that it is a part of. result: of the state's last step, JSON values."""

    step: int
    optimizer_updates: int
    segment: str
    dataset_id: str
    layout: str  # hash of all that decides what a part holds
    parts: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class FoundState:
    """A state in memory that is complete. holders: the rank that can read each part, by part."""

    claims: Claims
    holders: tuple[int, ...]
    where: Path
