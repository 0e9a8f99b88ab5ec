"""Makes the reference models, cases and fault injection beside the tests importable: importlib mode puts no test folder on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

for _name in ("amber_reference", "crystalcoder_reference", "fault_injection", "model_cases"):
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])
