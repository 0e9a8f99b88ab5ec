"""Whether QuACK (quack-kernels: kernels in NVIDIA's CuTe DSL) is here and fits the device, and the rows of ops that it
has and that are not offered. Read in quack-kernels 0.6.5.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch

from weftrain.kernels.contract import Implementation, KernelError, Spec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (0, 6)
_INSTALL = "pip install quack-kernels"


def unavailable(spec: Spec) -> str | None:
    """None on an NVIDIA GPU of compute capability 9 or 10 where quack-kernels >= 0.6 is installed."""
    if spec.device != "cuda":
        return f"needs an NVIDIA GPU, not {spec.device}"
    if spec.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    installed = _installed()
    if installed is None or importlib.util.find_spec("quack") is None:
        return f"quack is not installed: {_INSTALL}"
    if tuple(int(part) for part in installed.split(".")[:2] if part.isdigit()) < _OLDEST:
        return (
            f"needs quack-kernels >= {'.'.join(map(str, _OLDEST))}, this is {installed}: pip install --upgrade "
            "quack-kernels"
        )
    if torch.version.hip is not None:
        return "quack's kernels are for NVIDIA, not for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major in (9, 10) else f"quack is for compute capability 9 and 10, this is {major}.{minor}"


def _installed() -> str | None:
    """The version of the distribution quack-kernels; other packages import as `quack` too."""
    try:
        return importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def version() -> str:
    installed = _installed()
    return "not installed" if installed is None else f"quack-kernels {installed}"


def not_offered(op: str, reason: str) -> Implementation:
    """The row of an op that quack has and we do not offer: never available, whatever the use."""

    def function(*_: Any, **__: Any) -> Any:
        raise KernelError(f"{op}: {reason}")

    return Implementation(op, "quack", function, lambda spec: reason, version())
