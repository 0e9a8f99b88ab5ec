"""What a CUDA device needs beside its computation: copies on streams of their own, and activations kept in the host's
memory.

Not run on any GPU yet. What a reader would get wrong: the host runs ahead of the device. So a slot is written only
after the device has used it (`used` to `copying`), and host memory is read into again only after it was copied
(`wait_until_copied`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Streams:
    """Weights come in on one stream, gradients leave on another."""

    def __init__(self, device: torch.device) -> None:
        self._incoming, self._outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._used: dict[int, torch.cuda.Event] = {}
        self._copied: dict[int, torch.cuda.Event] = {}

    def pin(self, memory: Tensor) -> None:
        """Lock host memory in place, so that copies from it run beside the computation. Raises RuntimeError where CUDA
        refuses.
        """
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))

    @contextlib.contextmanager
    def copying(self, slot: int) -> Iterator[None]:
        """Copies into a slot, after its last use; computation that is enqueued later waits for them."""
        if slot in self._used:
            self._incoming.wait_event(self._used[slot])
        with torch.cuda.stream(self._incoming):
            yield
            self._copied[slot] = torch.cuda.Event()
            self._copied[slot].record(self._incoming)
        torch.cuda.current_stream().wait_event(self._copied[slot])

    def used(self, slot: int) -> None:
        """All that reads the slot has been enqueued."""
        self._used[slot] = torch.cuda.Event()
        self._used[slot].record()

    def wait_until_copied(self, slot: int) -> None:
        """The host memory that the slot was filled from may be overwritten."""
        if slot in self._copied:
            self._copied[slot].synchronize()

    def to_host(self, gradients: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        """Pinned copies of gradients on the host, and the event after which they are there."""
        self._outgoing.wait_stream(torch.cuda.current_stream())
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._outgoing):
            found = {}
            for name, gradient in gradients.items():
                found[name] = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True).copy_(
                    gradient, non_blocking=True
                )
                gradient.record_stream(self._outgoing)
            arrived.record(self._outgoing)
        return found, arrived


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Keeps what autograd saves in the host's memory, except weights: a view of a slot is true again when the layer is
    back.
    """

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
