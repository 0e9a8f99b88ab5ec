"""Whether liger-kernel is here and new enough, and the row of an op whose numerics or side effects are not the
contract's.

That liger has an op is not enough. Where it overwrites its inputs, rounds earlier or waits for the device, the op is
named in the table with that reason, and cannot be chosen. Read in liger-kernel 0.8.5.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from weftrain.kernels.contract import Implementation, KernelError, Spec
from weftrain.kernels.packages import installed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (0, 8)  # the signatures were read in 0.8.5
_MODULES = {  # op -> where liger has it
    "rms_norm": "liger_kernel.ops.rms_norm",
    "layer_norm": "liger_kernel.ops.layer_norm",
    "linear_cross_entropy": "liger_kernel.ops.fused_linear_cross_entropy",
}
MAX_HIDDEN_SIZE = 65536  # a row is one Triton block


def unavailable(spec: Spec) -> str | None:
    """None on a cuda device (NVIDIA, or AMD under ROCm) where liger-kernel >= 0.8 is installed."""
    if spec.device != "cuda":
        return f"liger's kernels run on cuda devices, not on {spec.device}"
    if spec.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    hidden_size = int(spec.attributes.get("hidden_size", 1))
    if spec.op in ("rms_norm", "layer_norm") and hidden_size > MAX_HIDDEN_SIZE:
        return f"needs hidden_size <= {MAX_HIDDEN_SIZE}, this is {hidden_size}"
    if not installed("liger_kernel"):
        return "liger_kernel is not installed: pip install liger-kernel"
    found = version().removeprefix("liger-kernel ")
    if tuple(int(part) for part in found.split(".")[:2] if part.isdigit()) < _OLDEST:
        return (
            f"needs liger-kernel >= {'.'.join(map(str, _OLDEST))}, this is {found}: pip install --upgrade liger-kernel"
        )
    if (module := _MODULES.get(spec.op)) is not None and not installed(module):
        return f"liger-kernel {found} has no {module}: pip install --force-reinstall liger-kernel"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def version() -> str:
    try:
        return f"liger-kernel {importlib.metadata.version('liger-kernel')}"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def not_offered(op: str, reason: str) -> Implementation:
    """The row of an op that liger has and we do not offer: never available, whatever the use."""

    def function(*_: Any, **__: Any) -> Any:
        raise KernelError(f"{op}: {reason}")

    return Implementation(op, "liger", function, lambda spec: reason, version())
