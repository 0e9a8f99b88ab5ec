"""Options that contradict each other are refused."""

from __future__ import annotations

import pytest
import torch

from weftrain.backends.cuda import BACKEND
from weftrain.backends.cuda.options import CudaOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"parallel": "ddp", "tensor_parallel": 2},
        {"parallel": "ddp", "cpu_offload": True},
        {"cuda_graphs": True, "compile": True},
        {"shard_group": 2},
    ],
)
def test_options_that_contradict_each_other(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"needs parallel|is of parallel|needs compile"):
        CudaOptions.model_validate(wrong)


@pytest.mark.parametrize(("version", "refused"), [("2.6.0+cu124", True), ("2.7.1", False), ("2.13.0a0+git", False)])
def test_a_torch_that_is_too_old_is_named(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    reason = "needs torch 2.7 or newer, this is 2.6.0+cu124: install one"
    assert BACKEND.unavailable() == (reason if refused else None)
