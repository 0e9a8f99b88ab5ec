"""Whether the triton that is installed can run this package's kernels, asked without importing it.

Each torch brings its own triton, so an older torch has an older one. It stays usable for torch.compile; the kernels of
kernels/triton_ops/ are then named as unavailable.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

OLDEST = (3, 4)  # has `triton.knobs`; torch 2.8 came with it
_REMEDY = "install torch 2.8 or newer, which brings one"


def why_not_triton() -> str | None:
    """None where triton is installed and new enough; else why its kernels cannot run, with the remedy."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'weftrain[triton]'"
    try:
        installed = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        try:
            installed = importlib.metadata.version("pytorch-triton")  # of torch's nightly builds
        except importlib.metadata.PackageNotFoundError:
            return None  # built from its sources
    if tuple(int(part) for part in installed.split(".")[:2] if part.isdigit()) < OLDEST:
        return f"needs triton {'.'.join(map(str, OLDEST))} or newer, this is {installed}: {_REMEDY}"
    return None


def interpreting() -> bool:
    """Whether triton was imported with TRITON_INTERPRET=1, which runs kernels by numpy, on a CPU, slowly."""
    triton = sys.modules.get("triton")
    return triton is not None and why_not_triton() is None and bool(triton.knobs.runtime.interpret)
