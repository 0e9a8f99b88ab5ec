"""Where the vendor's package is, for tests that ask it; and helpers that tests import by name, importable in importlib
mode.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.backends.cerebras import environment


@pytest.fixture(scope="session")
def vendor() -> Path:
    """The vendor's Python, for tests marked `cerebras`; where it is not there they are skipped, counted, and say so."""
    if reason := environment.missing():
        pytest.skip(f"the cerebras backend cannot run here: {reason}")
    return environment.python()
