"""These tests interpret Triton's kernels, which needs a process of its own: `make test` starts it with
TRITON_INTERPRET=1.

Elsewhere they are skipped and counted, and nothing here imports Triton.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETING:
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 and a process of its own: make test runs it")
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(skip)


if INTERPRETING:
    from weftrain.kernels.checks.interpreter import install

    install()
