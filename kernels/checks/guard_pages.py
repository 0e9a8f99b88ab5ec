"""Memory between two pages that cannot be touched (Linux): tensors placed there, and torch.empty made to place its
tensors there.

A tensor's size is no multiple of a page, so only one of its sides can lie at a guard page. The slack on the other side
is filled with a pattern that must survive, and everything runs twice, once for each side.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from weftrain.kernels.checks.evaluation import map_tensors
from weftrain.kernels.contract import Arguments, KernelError

_PATTERN = 0xA5
_NO_RESERVE = 0x4000  # of Linux's mman.h; Python names it from 3.13 on
_UNWRITTEN = 0xFF  # NaN in every float dtype: what an implementation allocates and does not write shows


def sparse_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of so many elements, of which only the pages that are touched take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


class GuardedMemory:
    """Allocates tensors that end ("end") or begin ("start") at a guard page. Never freed: for a process of its own."""

    def __init__(self, side: Literal["end", "start"]) -> None:
        self.side = side
        self._slacks: list[tuple[str, int, int]] = []  # what, address, bytes
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Contiguous, filled with NaN's bytes (or -1)."""
        elements = 1
        for size in shape:
            elements *= size
        if elements == 0:
            return torch.zeros(shape, dtype=dtype)
        size = elements * dtype.itemsize
        page = mmap.PAGESIZE
        inner = -(-size // page) * page
        base = self._libc.mmap(
            None, inner + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        if base in (None, ctypes.c_void_p(-1).value):
            raise KernelError(f"mmap of {inner + 2 * page} bytes failed: errno {ctypes.get_errno()}")
        for guard in (base, base + page + inner):
            if self._libc.mprotect(guard, page, 0) != 0:  # PROT_NONE
                raise KernelError(f"mprotect failed: errno {ctypes.get_errno()}")
        ctypes.memset(base + page, _PATTERN, inner)
        address = base + page + (inner - size if self.side == "end" else 0)
        ctypes.memset(address, _UNWRITTEN, size)
        slack = base + page if self.side == "end" else address + size
        self._slacks.append((f"{str(dtype).removeprefix('torch.')} {list(shape)}", slack, inner - size))
        buffer = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(buffer, dtype=dtype, count=elements).view(shape)

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy at the guard page."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor.detach())

    def place_all(self, arguments: Arguments) -> Arguments:
        """Every tensor of the arguments, in lists too."""
        return map_tensors(self.place, arguments)

    def written_outside(self) -> list[str]:
        """The tensors whose slack no longer holds the pattern."""
        expected = bytes([_PATTERN])
        return [
            f"a write {'before' if self.side == 'end' else 'after'} a tensor of {what}"
            for what, address, size in self._slacks
            if size and ctypes.string_at(address, size) != expected * size
        ]

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """torch.empty and its like give guarded memory to Python callers; C++ code that allocates is not reached."""
        names = ("empty", "empty_like", "zeros", "zeros_like")
        originals = {name: getattr(torch, name) for name in names}
        methods = {name: getattr(Tensor, name) for name in ("new_empty", "new_zeros")}

        def guarded(make: Callable[..., Tensor], fill: bool) -> Callable[..., Tensor]:
            def allocate(*args: Any, **kwargs: Any) -> Tensor:
                plain = make(*args, **kwargs)
                dense = type(plain) is Tensor and plain.device.type == "cpu" and plain.is_contiguous()
                if not dense or plain.numel() == 0 or plain.requires_grad or torch.compiler.is_compiling():
                    return plain
                placed = self.empty(tuple(plain.shape), plain.dtype)
                return placed.zero_() if fill else placed

            return allocate

        for name, make in originals.items():
            setattr(torch, name, guarded(make, "zeros" in name))
        for name, make in methods.items():
            setattr(Tensor, name, guarded(make, "zeros" in name))
        try:
            yield
        finally:
            for name, make in originals.items():
                setattr(torch, name, make)
            for name, make in methods.items():
                setattr(Tensor, name, make)
