"""What passes between the processes of a run. Here for a run of one process, where nothing is sent; replicas/ overrides
it for several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from weftrain.backends.streaming.store.layout import Record
from weftrain.core.errors import BackendError

Gradients = dict[str, Tensor]
Finish = Callable[[Record, Gradients], None]


class Communicator:
    """A group of one."""

    rank, size = 0, 1
    sharded = False  # each rank's store owns a part of every tile
    several = False  # weights can come from another rank

    def micro_batches(self, count: int) -> range:
        """Those of the global batch that this rank computes."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def command(self, **what: Any) -> None:
        """For rank 0: tell the others what comes next."""

    def command_owners(self, **what: Any) -> None:
        """The same, if the others own parts of the state."""

    def regroup(self) -> None:
        """For rank 0, between two steps: admit ranks that wait, and release those that asked to leave."""

    def broadcast_weights(self, record: Record, slot: Tensor | None) -> None:
        """Bring a record's weights into every rank's slot."""

    def reduce(self, record: Record, parts: list[Gradients], finish: Finish) -> None:
        """Add the gradients of this rank's micro-batches (`parts`, in order) to those of the ranks before it; `finish`
        gets the sum of all on the ranks that store it, at once or later.
        """
        if len(parts) > 1:
            raise BackendError("one process adds its micro-batches as they come")
        finish(record, parts[0])

    def finish_reductions(self) -> None:
        """Wait for every reduction that is still in flight."""

    def gather_losses(self, own: list[Tensor]) -> list[Tensor]:
        """The losses of all ranks, in the order of ranks."""
        return own

    def sum(self, number: int) -> int:
        """The sum of a number over all ranks, on every rank."""
        return number

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank."""
        return tensor

    def join_parts(self, tensor: Tensor) -> Tensor:
        """For rank 0: an fp32 tensor of which each rank owns a part and has zeros elsewhere, bit for bit."""
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""

    def abort(self) -> None:
        """Leave at once: ranks that wait for this one get an error."""

    def close(self) -> None:
        """Leave the group."""
