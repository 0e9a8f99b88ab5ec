"""Makes ranks.py importable: importlib mode puts no test folder on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if "ranks" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("ranks", Path(__file__).parent / "cuda" / "ranks.py")
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["ranks"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["ranks"])


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[None]:
    from ranks import world_of

    with world_of(4):
        yield
