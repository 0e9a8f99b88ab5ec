"""The order of copies and waits, with recorded streams; and that pieces put together are the tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from weftrain.backends.common import copies
from weftrain.backends.common.copies import HostCopy, RowsAhead, Streams
from weftrain.backends.common.step import Rows
from weftrain.core.order.batch import Batch

CPU = torch.device("cpu")


class Stream:
    """A stream of which every call is noted."""

    def __init__(self, name: str, seen: list[Any]) -> None:
        self.name, self.seen, self.events = name, seen, 0

    def record_event(self) -> str:
        self.events += 1
        self.seen.append(("recorded", self.events))
        return f"event {self.events}"

    def wait_event(self, event: str) -> None:
        self.seen.append(("waits for", event))


def test_rows_are_copied_on_another_stream_one_micro_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    copying, computing = Stream("copies", seen), Stream("computes", seen)
    at = [computing]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        at.append(stream)
        yield
        at.pop()

    def to_device(batch: Batch, device: torch.device) -> Any:
        seen.append(("copied", int(batch.ids[0, 0]), at[-1].name))
        return Rows(torch.zeros(1), torch.zeros(1), None, None)

    monkeypatch.setattr(copies, "to_device", to_device)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: seen.append(("kept for", stream.name)))
    ahead = RowsAhead(CPU, Streams(lambda: copying, on, lambda: computing))
    for number, _ in enumerate(ahead(Batch(np.full((1, 2), number)) for number in range(3))):
        seen.append(("computed", number))
    kept = [("kept for", "computes")] * 2
    assert seen == [
        *[("copied", 0, "copies"), ("recorded", 1), ("copied", 1, "copies"), ("recorded", 2)],
        *[("waits for", "event 1"), *kept, ("computed", 0), ("copied", 2, "copies"), ("recorded", 3)],
        *[("waits for", "event 2"), *kept, ("computed", 1), ("waits for", "event 3"), *kept, ("computed", 2)],
    ]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_on_a_cpu_come_in_order(count: int) -> None:
    found = list(RowsAhead(CPU)(Batch(np.full((2, 4), number)) for number in range(count)))
    assert [int(rows.ids[0, 0]) for rows in found] == list(range(count))


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (16, 4), (33, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_put_together_are_the_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Buffers of 64 bytes, used in turn, for tensors of one piece and of many."""
    copy = HostCopy(CPU, piece_bytes=64, buffered=True)
    for seed in range(2):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        found = copy(tensor)
        assert torch.equal(found, tensor)
        assert (found.dtype, found.shape) == (dtype, tensor.shape)
        assert tensor.numel() == 0 or found.data_ptr() != tensor.data_ptr()
    across = torch.randn(6, 8).t()
    assert torch.equal(copy(across), across)
