"""Runs and Hugging Face folders that the tests of comparisons share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_cases import save_neox

from weftrain.core.config import Recipe


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("crystal", "schedule.steps=6", "log.every_steps=1")


@pytest.fixture
def neox(tmp_path: Path) -> Path:
    """A series of two revisions."""
    for step in (1000, 2000):
        save_neox(tmp_path / "pythia" / f"step{step}", step)
    return tmp_path / "pythia"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Three rows of unequal length."""
    rows = [np.random.default_rng(length).integers(0, 64, length).tolist() for length in (5, 12, 3)]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(row if number else {"ids": row}) + "\n" for number, row in enumerate(rows)))
    return path
