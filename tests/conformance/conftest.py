"""The backend that a test of the suite is about: each backend in one process, and the cuda backend on two ranks and on four."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weftrain.backends.registry import find_backends

if "ranks" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("ranks", Path(__file__).parents[1] / "backends" / "cuda" / "ranks.py")
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["ranks"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["ranks"])

TRAINERS = sorted(name for name, backend in find_backends().items() if backend.trains and backend.unavailable() is None)


@pytest.fixture(scope="module", params=[*TRAINERS, "cuda-2", pytest.param("cuda-4", marks=pytest.mark.prove)])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a backend, with `-ranks` where there are several; their processes are started once for all tests of the module."""
    from ranks import world_of

    from weftrain.backends.cuda.world import leave

    wanted: str = request.param
    _, _, ranks = wanted.partition("-")
    if not ranks:
        yield wanted
        leave()  # a world of one that runs of the cuda backend left
        return
    with world_of(int(ranks)):
        yield wanted
