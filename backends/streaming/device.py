"""The device's memory, and the copies between it and the host.

On a CUDA device copies run on streams of their own: weights arrive on one, gradients and activations leave on another.
The CUDA part has not been run on a GPU yet. There the host runs ahead of the device, so a slot is overwritten only
after the device has used it (`used` to `copying`), and the host memory that it was filled from only after the copy
(`wait_until_copied`).

On a CPU, `backend.options.device_memory_limit_mib` makes a part of the host's memory stand in for a device's: the same
records are copied, in the same order, and every byte is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weftrain.backends.streaming.communicator import Gradients
from weftrain.backends.streaming.store.arena import aligned, register, unregister
from weftrain.core.errors import OutOfMemoryError
from weftrain.core.formats.units import gib

_POOL_CHUNK_BYTES = 1 << 28


class DeviceMemory:
    """What the engine itself allocates on the device: slots, states and gradients. Activations are torch's."""

    def __init__(self, device: torch.device, limit_bytes: int | None) -> None:
        self.device, self._limit, self.used_bytes = device, limit_bytes, 0

    def allocate(self, size_bytes: int, what: str) -> Tensor:
        """uint8 [size_bytes]. Raises OutOfMemoryError beyond the limit, or if the device has no more memory."""
        if self._limit is not None and self.used_bytes + size_bytes > self._limit:
            raise self._exhausted(size_bytes, what, f"of {gib(self._limit)}")
        try:
            found = torch.zeros(size_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise self._exhausted(size_bytes, what, "of what is free") from error
        self.used_bytes += size_bytes
        return found

    def _exhausted(self, size_bytes: int, what: str, limit: str) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"out of device memory: {what} needs {gib(size_bytes)}, and {gib(self.used_bytes)} {limit} are taken: "
            "set backend.options.layers_on_device to fewer, gradients_on_device=false, or batch.micro_batch_size to "
            "less"
        )


@dataclass
class Held:
    """A tensor of the device in host memory, and on its way back."""

    device: torch.device
    host: Tensor
    left: Any = None  # CUDA events: of the copy to the host, and of the one back
    back: Tensor | None = None
    arrived: Any = None


class Copies:
    """For a CPU: nothing runs by itself. `moved` are the bytes that were copied to and from a device that stands in."""

    def __init__(self) -> None:
        self.to_device_bytes = self.to_host_bytes = 0
        self.held_bytes = 0  # of activations that have been sent to the host, in total

    def pinned(self, memory: Tensor) -> Tensor:
        """Host memory, locked in place if a device copies from it."""
        return memory

    def copying(self, slot: int) -> AbstractContextManager[None]:
        """Around copies into a slot: they follow its last use."""
        return contextlib.nullcontext()

    def wait_for_copy(self, slot: int) -> None:
        """Later computation waits for the copies into a slot."""

    def used(self, slot: int) -> None:
        """All computation that reads the slot has been requested."""

    def wait_until_copied(self, slot: int) -> None:
        """Wait until the host memory that the slot was filled from may be overwritten."""

    def leaving(self, gradients: Gradients) -> AbstractContextManager[None]:
        """Around copies of gradients to host memory, which may be requested and not waited for."""
        return contextlib.nullcontext()

    def to_host(self, gradients: Gradients, write: Callable[[Gradients], None]) -> None:
        """Call `write` with the gradients in host memory, at once or later."""
        write(gradients)

    def fetch(self, source: Tensor, target: Tensor) -> None:
        """Copy device memory to host memory, and wait for it."""
        target.copy_(source)

    def send_away(self, tensor: Tensor) -> Held:
        """Copy a tensor to host memory."""
        self.held_bytes += tensor.nbytes
        return Held(tensor.device, tensor.clone())

    def bring_back(self, held: Held) -> None:
        """Begin to copy it back."""
        held.back = held.host

    def returned(self, held: Held) -> Tensor:
        """The tensor, on the device again."""
        if held.back is None:
            self.bring_back(held)
        found, held.back = held.back, None
        assert found is not None
        return found

    def forget_held(self) -> None:
        """Everything that was sent away has come back, or is not needed any more."""

    def noted(self, tensor: Tensor) -> Callable[[], list[Any]]:
        """What gives a small tensor's values, once they are asked for, and waits for no later computation."""
        return tensor.tolist

    def finish(self) -> None:
        """Wait until all gradients have been written."""

    def close(self) -> None:
        """Before the host memory that was pinned is freed."""


class CudaCopies(Copies):
    """Weights arrive on one stream, gradients leave on another."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._incoming, self._outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._used: dict[int, torch.cuda.Event] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        self._leaving: list[tuple[Gradients, torch.cuda.Event, Callable[[Gradients], None]]] = []
        self._pinned: list[Tensor] = []
        self._pool, self._pool_used = list[Tensor](), list[int]()  # pinned memory for `Held`, filled from the start
        self._staging: list[Tensor] = []  # used in turn, so that one is written out while the next one arrives

    def pinned(self, memory: Tensor) -> Tensor:
        register(memory, "a buffer for copies")
        self._pinned.append(memory)
        return memory

    @contextlib.contextmanager
    def copying(self, slot: int) -> Iterator[None]:
        if slot in self._used:
            self._incoming.wait_event(self._used[slot])
        with torch.cuda.stream(self._incoming):
            yield
            self._copied[slot] = torch.cuda.Event()
            self._copied[slot].record(self._incoming)

    def wait_for_copy(self, slot: int) -> None:
        if slot in self._copied:
            torch.cuda.current_stream().wait_event(self._copied[slot])

    def used(self, slot: int) -> None:
        self._used[slot] = torch.cuda.Event()
        self._used[slot].record()

    def wait_until_copied(self, slot: int) -> None:
        if slot in self._copied:
            self._copied[slot].synchronize()

    @contextlib.contextmanager
    def leaving(self, gradients: Gradients) -> Iterator[None]:
        self._outgoing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._outgoing):
            yield
            for gradient in gradients.values():
                gradient.record_stream(self._outgoing)

    def to_host(self, gradients: Gradients, write: Callable[[Gradients], None]) -> None:
        """Written one call later, so that the copy runs beside the next record's backward."""
        self._finish(keep=1)
        arrived, found = torch.cuda.Event(), {}
        size = sum(-(-gradient.nbytes // 64) * 64 for gradient in gradients.values())
        staging, offset = self._stage(size), 0
        with self.leaving(gradients):
            for name, gradient in gradients.items():
                place = staging[offset : offset + gradient.nbytes].view(gradient.dtype).view(gradient.shape)
                found[name] = place.copy_(gradient, non_blocking=True)
                offset += -(-gradient.nbytes // 64) * 64
            arrived.record(self._outgoing)
        self._leaving.append((found, arrived, write))

    def _stage(self, size_bytes: int) -> Tensor:
        """The pinned buffer whose gradients were written last."""
        held = self._staging.pop(0) if len(self._staging) > 1 else None
        if held is None or held.numel() < size_bytes:
            held = self.pinned(aligned(size_bytes))
        self._staging.append(held)
        return held

    def fetch(self, source: Tensor, target: Tensor) -> None:
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._outgoing):
            target.copy_(source, non_blocking=True)
            arrived.record(self._outgoing)
        arrived.synchronize()

    def send_away(self, tensor: Tensor) -> Held:
        self.held_bytes += tensor.nbytes
        host = self._from_pool(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        self._outgoing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._outgoing):
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._outgoing)
            left = torch.cuda.Event()
            left.record(self._outgoing)
        return Held(tensor.device, host, left)

    def _from_pool(self, size_bytes: int) -> Tensor:
        place = -(-size_bytes // 64) * 64
        for number, chunk in enumerate(self._pool):
            if self._pool_used[number] + place <= chunk.numel():
                break
        else:
            number = len(self._pool)
            self._pool.append(self.pinned(aligned(max(place, _POOL_CHUNK_BYTES))))
            self._pool_used.append(0)
        first = self._pool_used[number]
        self._pool_used[number] += place
        return self._pool[number][first : first + size_bytes]

    def bring_back(self, held: Held) -> None:
        with torch.cuda.stream(self._incoming):
            self._incoming.wait_event(held.left)
            held.back = held.host.to(held.device, non_blocking=True)
            held.arrived = torch.cuda.Event()
            held.arrived.record(self._incoming)

    def returned(self, held: Held) -> Tensor:
        found, current = super().returned(held), torch.cuda.current_stream()
        current.wait_event(held.arrived)
        found.record_stream(current)
        return found

    def forget_held(self) -> None:
        self._pool_used = [0] * len(self._pool)

    def noted(self, tensor: Tensor) -> Callable[[], list[Any]]:
        host, there = tensor.to("cpu", non_blocking=True), torch.cuda.Event()  # torch makes `host` pinned memory
        there.record()

        def values() -> list[Any]:
            there.synchronize()
            found: list[Any] = host.tolist()
            return found

        return values

    def finish(self) -> None:
        self._finish(keep=0)
        self._outgoing.synchronize()

    def close(self) -> None:
        for memory in self._pinned:
            unregister(memory)
        self._pinned = []

    def _finish(self, keep: int) -> None:
        while len(self._leaving) > keep:
            gradients, arrived, write = self._leaving.pop(0)
            arrived.synchronize()
            write(gradients)
