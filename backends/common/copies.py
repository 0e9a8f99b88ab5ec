"""Copies between host and device that the host does not wait for: rows one micro-batch ahead, state by way of
page-locked buffers. On a CPU the rows are converted one ahead, and state is copied directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from weftrain.backends.common.step import Rows, to_device
from weftrain.core.order.batch import Batch

_PIECE_BYTES = 64 << 20  # of a tensor that one page-locked buffer holds


class Streams(NamedTuple):
    """What is needed of CUDA, so that the order of calls can be tested without it."""

    new: Callable[[], Any]
    on: Callable[[Any], Any]  # a context manager: what is launched within goes to the stream
    current: Callable[[], Any]


def cuda_streams(device: torch.device) -> Streams | None:
    if device.type != "cuda":
        return None
    return Streams(lambda: torch.cuda.Stream(device), torch.cuda.stream, lambda: torch.cuda.current_stream(device))


class RowsAhead:
    """Brings micro-batches to a device. Each is copied, on a stream of its own, before the one in front is handed out,
    and so while that one computes.
    """

    def __init__(self, device: torch.device, streams: Streams | None = None) -> None:
        self._device, self._streams = device, streams or cuda_streams(device)
        self._stream = None if self._streams is None else self._streams.new()

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Rows]:
        ahead: tuple[Rows, Any] | None = None
        for batch in batches:
            copied = self._begin(batch)
            if ahead is not None:
                yield self._finish(*ahead)
            ahead = copied
        if ahead is not None:
            yield self._finish(*ahead)

    def _begin(self, batch: Batch) -> tuple[Rows, Any]:
        if self._streams is None or self._stream is None:
            return to_device(batch, self._device), None
        with self._streams.on(self._stream):
            rows = to_device(batch, self._device)
        return rows, self._stream.record_event()

    def _finish(self, rows: Rows, copied: Any) -> Rows:
        """The stream that computes waits for the copy, and the allocator for what it computes."""
        if self._streams is not None:
            computing = self._streams.current()
            computing.wait_event(copied)
            for tensor in rows.tensors():
                tensor.record_stream(computing)
        return rows


class HostCopy:
    """Copies of a device's tensors in plain host memory, by way of two page-locked buffers: the device fills one while
    the host empties the other. Without them a copy runs at a fraction of the bus.
    """

    def __init__(self, device: torch.device, piece_bytes: int = _PIECE_BYTES, buffered: bool | None = None) -> None:
        """buffered: whether buffers are used; None: for a CUDA device."""
        self._cuda = device.type == "cuda"
        self._buffered = self._cuda if buffered is None else buffered
        self._piece_bytes = piece_bytes
        self._buffers: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory. Returns when it is complete."""
        if not self._buffered or tensor.numel() == 0:
            return tensor.detach().to("cpu", copy=True)
        if not self._buffers:
            self._buffers = [torch.empty(self._piece_bytes, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        found = torch.empty(tensor.shape, dtype=tensor.dtype)
        size = self._piece_bytes // tensor.element_size()
        sources = tensor.detach().contiguous().view(-1).split(size)
        filled: tuple[torch.Tensor, torch.Tensor, Any] | None = None
        for number, (source, target) in enumerate(zip(sources, found.view(-1).split(size), strict=True)):
            buffer = self._buffers[number % 2].view(tensor.dtype)[: source.numel()]
            buffer.copy_(source, non_blocking=True)
            event = torch.cuda.current_stream(tensor.device).record_event() if self._cuda else None
            if filled is not None:
                _empty(*filled)
            filled = buffer, target, event
        if filled is not None:
            _empty(*filled)
        return found


def _empty(buffer: torch.Tensor, target: torch.Tensor, event: Any) -> None:
    if event is not None:
        event.synchronize()
    target.copy_(buffer)
