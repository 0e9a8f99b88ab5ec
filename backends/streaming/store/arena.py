"""Host memory in one piece: page-aligned, in huge pages if the system has them, and registered once with a CUDA device.

torch's own pinned memory is not used for a state: its allocator rounds each tensor up to a power of two.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings

import psutil
import torch
from torch import Tensor

from weftrain.backends.streaming.store.layout import PAGE_BYTES
from weftrain.core.errors import BackendError
from weftrain.core.formats.units import gib

_CHUNK_BYTES = 1 << 30  # touched at once; between two of them the memory that is left is looked at
_RESERVE_BYTES = 1 << 30  # left for the rest of the machine: pinned memory cannot be swapped out


def aligned(size_bytes: int) -> Tensor:
    """uint8 [size_bytes] of page-aligned memory, zeros; freed with the tensor."""
    memory = mmap.mmap(-1, max(size_bytes, PAGE_BYTES))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # no huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size_bytes]


def pinned_arena(size_bytes: int, what: str) -> Tensor:
    """The same, resident and registered with CUDA. Raises BackendError if the machine's memory runs out on the way."""
    memory = aligned(size_bytes)
    for start in range(0, size_bytes, _CHUNK_BYTES):
        part = memory[start : start + _CHUNK_BYTES]
        available = psutil.virtual_memory().available
        if part.numel() + _RESERVE_BYTES > available:
            raise BackendError(
                f"host memory shrank while it was being pinned for {what}: {gib(start)} of {gib(size_bytes)} were "
                f"taken and {gib(available)} are left: end other programs, give the job more memory, or take "
                "backend.options.tier=direct or a smaller backend.options.state_format"
            )
        part[::PAGE_BYTES] = 0  # makes the pages resident, so that registering them cannot run out of memory
    register(memory, what)
    return memory


def register(memory: Tensor, what: str) -> None:
    """Lock pages in memory, so that copies to and from a device run beside computation. Warns if CUDA refuses."""
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if status:
        warnings.warn(
            f"{gib(memory.numel())} of host memory for {what} could not be pinned (CUDA error {status}), so copies "
            "to the device are slower and wait: raise the limit of locked memory (`ulimit -l`, or the container's)",
            stacklevel=3,
        )


def unregister(memory: Tensor) -> None:
    """Before registered memory is freed."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
