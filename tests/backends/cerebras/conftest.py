"""Where the vendor's package is, for tests that ask it; and helpers that tests import by name, importable in importlib mode."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from weftrain.backends.cerebras import environment

_HERE = Path(__file__).parent
for _path in (_HERE.parents[1] / "core" / "fault_injection.py", _HERE.parents[1] / "core" / "model_cases.py", _HERE / "lowered_graphs.py"):
    if _path.stem not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_path.stem, _path)
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[_path.stem] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_path.stem])


@pytest.fixture(scope="session")
def vendor() -> Path:
    """The vendor's Python, for tests marked `cerebras`; where it is not there they are skipped, counted, and say so."""
    if reason := environment.missing():
        pytest.skip(f"the cerebras backend cannot run here: {reason}")
    return environment.python()
