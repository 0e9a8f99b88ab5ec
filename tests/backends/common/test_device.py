"""A device that is not there, and more threads than a process may have, are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from weftrain.backends.common.device import DeviceOptions, torch_device, use_threads
from weftrain.core.backend import Job, Plan
from weftrain.core.config import MAX_THREADS, Recipe
from weftrain.core.errors import BackendError


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_device("auto") == torch.device("cpu")
    with pytest.raises(BackendError, match="device=cpu"):
        torch_device("cuda")


def test_threads_of_a_stranger_are_bounded(tiny_recipe: Callable[..., Recipe]) -> None:
    job = Job(tiny_recipe(), Plan(0, 1), DeviceOptions(), threads=MAX_THREADS + 1)
    with pytest.raises(BackendError, match="CPU threads are more than"):
        use_threads(job, 0)
