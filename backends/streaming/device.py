"""Copies between the device and the host: none on a CPU; on a CUDA device they run beside the computation.

The CUDA part has not been run on a GPU yet. There the host runs ahead of the device, so a slot is overwritten only
after the device has used it (`used` to `copying`), and the host memory that it was filled from only after the copy
(`wait_until_copied`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from weftrain.backends.streaming.communicator import Gradients


class Copies:
    """For a CPU: weights and gradients are in host memory already."""

    def pinned(self, memory: Tensor) -> Tensor:
        """Host memory, locked in place if a device copies from it."""
        return memory

    def copying(self, slot: int) -> AbstractContextManager[None]:
        """Around copies into a slot: they follow its last use, and later computation waits for them."""
        return contextlib.nullcontext()

    def used(self, slot: int) -> None:
        """All computation that reads the slot has been requested."""

    def wait_until_copied(self, slot: int) -> None:
        """Wait until the host memory that the slot was filled from may be overwritten."""

    def to_host(self, gradients: Gradients, write: Callable[[Gradients], None]) -> None:
        """Call `write` with the gradients in host memory, at once or later."""
        write(gradients)

    def finish(self) -> None:
        """Wait until all gradients have been written."""


class CudaCopies(Copies):
    """Weights arrive on one stream, gradients leave on another."""

    def __init__(self, device: torch.device) -> None:
        self._incoming, self._outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._used: dict[int, torch.cuda.Event] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        self._leaving: list[tuple[Gradients, torch.cuda.Event, Callable[[Gradients], None]]] = []

    def pinned(self, memory: Tensor) -> Tensor:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        return memory

    @contextlib.contextmanager
    def copying(self, slot: int) -> Iterator[None]:
        if slot in self._used:
            self._incoming.wait_event(self._used[slot])
        with torch.cuda.stream(self._incoming):
            yield
            self._copied[slot] = torch.cuda.Event()
            self._copied[slot].record(self._incoming)
        torch.cuda.current_stream().wait_event(self._copied[slot])

    def used(self, slot: int) -> None:
        self._used[slot] = torch.cuda.Event()
        self._used[slot].record()

    def wait_until_copied(self, slot: int) -> None:
        if slot in self._copied:
            self._copied[slot].synchronize()

    def to_host(self, gradients: Gradients, write: Callable[[Gradients], None]) -> None:
        """Written one call later, so that the copy runs beside the next record's backward."""
        self._outgoing.wait_stream(torch.cuda.current_stream())
        arrived, found = torch.cuda.Event(), {}
        with torch.cuda.stream(self._outgoing):
            for name, gradient in gradients.items():
                pinned = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
                found[name] = pinned.copy_(gradient, non_blocking=True)
                gradient.record_stream(self._outgoing)
            arrived.record(self._outgoing)
        self._leaving.append((found, arrived, write))
        self._finish(keep=1)

    def finish(self) -> None:
        self._finish(keep=0)

    def _finish(self, keep: int) -> None:
        while len(self._leaving) > keep:
            gradients, arrived, write = self._leaving.pop(0)
            arrived.synchronize()
            write(gradients)


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Keeps what autograd saves in host memory, except weights: views of a slot are valid again when its layer is."""

    def __init__(self, slots: set[int]) -> None:
        def pack(tensor: Tensor) -> tuple[Any, Tensor]:
            if isinstance(tensor, torch.nn.Parameter) or tensor.untyped_storage().data_ptr() in slots:
                return None, tensor
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            return tensor.device, held.copy_(tensor, non_blocking=tensor.is_cuda)

        def unpack(saved: tuple[Any, Tensor]) -> Tensor:
            device, tensor = saved
            return tensor if device is None else tensor.to(device, non_blocking=True)

        super().__init__(pack, unpack)
