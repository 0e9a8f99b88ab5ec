"""When torch.compile can generate code for a device: what the two optimizer ops need, which are compiled by
themselves.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

from weftrain.kernels.contract import Spec


def needs_compiler(spec: Spec) -> str | None:
    """The `unavailable` of an implementation that runs through torch.compile on its own: it needs a C++ compiler, on
    CUDA Triton too.
    """
    compiler = os.environ.get("CXX", "g++")  # the one that torch.compile's CPU code generator calls
    if shutil.which(compiler) is None:
        return f"torch.compile needs the C++ compiler '{compiler}', which is not on PATH"
    if spec.device != "cpu" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on this device: pip install triton"
    return None
