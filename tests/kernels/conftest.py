"""One option for the whole folder: `pytest tests/kernels --kernel-device cuda` asks the same questions of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def kernel_device(request: pytest.FixtureRequest) -> str:
    """The device that implementations are examined on: --kernel-device."""
    device = str(request.config.getoption("--kernel-device"))
    if device == "cuda" and not torch.cuda.is_available():
        pytest.fail("--kernel-device cuda: torch sees no CUDA device")
    return device


@pytest.fixture(scope="session")
def examine() -> Callable[..., Any]:
    """tests/kernels/mutants.py: examine(folder, op, file, old text, new text, check, example, dtype, empty folder) ->
    CheckReport.
    """
    import mutants

    found: Callable[..., Any] = mutants.examine
    return found
