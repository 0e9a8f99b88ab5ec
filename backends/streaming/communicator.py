"""The communication between the processes of a run: here for one process, which sends nothing; replicas/group.py for
several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from weftrain.backends.common.sums import TreeSum
from weftrain.backends.streaming.store.layout import Record
from weftrain.core.errors import BackendError

Gradients = dict[str, Tensor]
Finish = Callable[[Record, Gradients], None]


class Communicator:
    """A group of one process."""

    rank, size = 0, 1
    sharded = False  # each rank's store owns a part of every tile
    several = False  # weights can come from another rank

    def micro_batches(self, count: int) -> range:
        """The micro-batches of the global batch that this rank computes."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def command(self, **what: Any) -> None:
        """For rank 0: tell the others what to do next."""

    def command_owners(self, **what: Any) -> None:
        """The same, if the others own parts of the state."""

    def regroup(self) -> None:
        """For rank 0, between two steps: admit ranks that wait, and let those leave that asked to."""

    def broadcast_weights(self, record: Record, slot: Tensor | None) -> None:
        """Copy a record's weights into every rank's slot."""

    def reduce(self, record: Record, parts: list[Gradients], finish: Finish, tree: TreeSum | None) -> None:
        """Add the gradients of this rank's micro-batches (`parts`, in order) to those of the ranks before it. On the
        ranks that store the sum over all ranks, `finish` is called with it, at once or later.

        tree: the shape of the tree over all micro-batches in which they are added; rank 0's parts are then its partial
        sums. None: one after another; rank 0's only part is then its sum.
        """
        if len(parts) > 1:
            raise BackendError("one process adds up its micro-batches itself: a bug in the pass")
        finish(record, parts[0])

    def finish_reductions(self) -> None:
        """Wait for every reduction."""

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
        """For rank 0: the whole of an fp32 tensor of which each rank has a part, and zeros elsewhere."""
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""

    def abort(self) -> None:
        """Leave at once; ranks that wait for this one get an error."""

    def close(self) -> None:
        """Leave the group."""
