"""Models and rows that the tests of memorization share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memorization_cases import PARAMETERS, ROOTS, K, L, chunk_of, random_generator

from weftrain.analysis.memorization import scores as memorization
from weftrain.analysis.memorization.scores import LazyCheckpoint, MemorizationResult
from weftrain.core.config import Recipe
from weftrain.core.model_config import ModelConfig


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)  # so small a model gains nothing from a second


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """16 random rows; the first 8 will be known."""
    return np.random.default_rng(1).integers(0, 97, (16, K + L + 2))


@pytest.fixture
def config(tiny_recipe: Callable[..., Recipe]) -> ModelConfig:
    return tiny_recipe("amber").model


@pytest.fixture
def measuring(config: ModelConfig, rows: np.ndarray) -> Callable[..., list[MemorizationResult]]:
    """measuring(folder): two random checkpoints, three chunks."""
    chunks = [chunk_of(rows[i : i + 4], f"chunk_{i}", first_step=i, stop_step=i + 4, number=10 * i) for i in (0, 4, 8)]
    snapshots = [
        LazyCheckpoint(step, root, lambda seed=step: random_generator(config, seed))
        for step, root in ((4, ROOTS[0]), (8, ROOTS[1]))
    ]

    def run(folder: Path, **changes: Any) -> list[MemorizationResult]:
        return memorization.measure(
            folder, **{"snapshots": snapshots, "chunks": chunks, "parameters": PARAMETERS, **changes}
        )

    return run
