"""Whether torch.compile can generate code for a device, which the two optimizer ops need."""

from __future__ import annotations

import importlib.util
import os
import shutil

from weftrain.kernels.contract import Spec


def needs_compiler(spec: Spec) -> str | None:
    """The `unavailable` of an implementation that calls torch.compile itself."""
    compiler = os.environ.get("CXX", "g++")  # the one that torch.compile's CPU code generator calls
    if shutil.which(compiler) is None:
        return f"torch.compile needs the C++ compiler '{compiler}', which is not on PATH"
    if spec.device != "cpu" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on this device: pip install triton"
    return None
