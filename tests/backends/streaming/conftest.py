"""Makes the helpers beside the tests, and the fault injection of tests/core, importable: importlib mode puts no test folder on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).parent
for _name, _folder in (("streaming_runs", _HERE), ("fault_injection", _HERE.parents[1] / "core")):
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_name, _folder / f"{_name}.py")
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])
