"""Options of another backend are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from weftrain.backends.common.base import options_of
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.null import NullOptions
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError


def test_options_of_another_backend_are_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    job = Job(tiny_recipe(), Plan(0, 1), NullOptions())
    assert options_of(job, NullOptions) is job.options
    with pytest.raises(BackendError, match="takes CudaOptions and was given NullOptions"):
        options_of(job, CudaOptions)
