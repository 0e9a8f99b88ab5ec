"""The store: weights, optimizer state and spooled gradients off the device, and the transaction that each step is.

    ram      tensors of this process; updated in place; nothing survives the process (ram.py)
    mapped   a file mapped into memory: weights are used where they lie, in the page cache (mapped.py)
    direct   a file read and written past the page cache, through reused buffers: no more memory than the schedule asks
             for (direct.py)

There is no undo and no log. An update writes a tile beside its old version (layout.py), a gradient has a place of its
own until every tile was updated with it, and the `Commit` says how many steps are complete and how many tiles have had
the last update. A process killed at any instant leaves old or new tiles, and the commit that says which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from weftrain.backends.streaming.store.layout import Layout, Record, Tile
from weftrain.core.errors import BackendError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}

Planes = dict[str, Tensor]
# A part of a tile to update: first and last of its owned elements, planes to change in place, the elements' gradient.
Part = tuple[int, int, Planes, Tensor]


@dataclass(frozen=True)
class Pending:
    """The update that follows from the last step: decided, and not yet made on every tile."""

    gradient_scale: float
    learning_rates: dict[str, float]
    update_index: int


@dataclass(frozen=True)
class Completed:
    """A completed step; `step` counts it. stretch: Job.segment. result: the StepResult as JSON, see state.py."""

    step: int
    optimizer_updates: int
    pending: Pending | None
    dataset_id: str | None
    stretch: str
    result: dict[str, Any] | None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` made."""
        pending = values["pending"]
        return cls(**{**values, "pending": None if pending is None else Pending(**pending)})


@dataclass(frozen=True)
class Commit(Completed):
    """Where the store stands. `cursor` tiles have had the pending update; `rotation` counts those that all tiles have
    had.
    """

    dataset_id: str | None = None
    stretch: str = ""  # of the process that completed the last step,
    before: str = ""  # and of the one before that
    result: dict[str, Any] | None = None
    rotation: int = 0
    cursor: int = 0
    filled_step: int = 0  # where it stood when it was filled: what is beyond is training that no checkpoint need have
    sequence: int = 0
    boot_id: str = ""
    closed: bool = False


def no_trace(track: str, name: str, start_s: float, end_s: float) -> None:
    """Records no timeline."""


class Store(ABC):
    """What the three tiers share. All memory is the host's."""

    tier = ""
    buffer_bytes = 0  # for state in flight
    # whether what the first record's next update needs, beyond weights and gradient, is here or on its way
    has_read_ahead = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.commit: Commit | None = None  # None: holds no state yet
        self.bytes_read = self.bytes_written = 0  # requested, in total
        self.stall_s = self.io_s = 0.0  # waited for by the executor; spent by the disk, summed over reads and writes
        self.trace: Callable[[str, str, float, float], None] = no_trace  # track, name, start and end in seconds

    # -- what differs from tier to tier

    def prefetch(self, record: Record, slot: Tensor | None, with_state: bool) -> None:
        """Begin to load a record: its weights, and if with_state all that an update needs."""

    def read_ahead(self, record: Record) -> None:
        """Begin to load the first record's state for the step after this one, while this one still computes."""

    def drop_ahead(self) -> None:
        """No update follows: release what was read ahead."""

    @abstractmethod
    def compute_planes(self, record: Record) -> list[Tensor]:
        """For each tile of a loaded record its owned weights in the compute dtype, flat."""

    @abstractmethod
    def updating(self, tile: Tile) -> Iterator[Part]:
        """The parts of a tile, to be updated in place one by one; the tile counts as updated when the iterator is
        exhausted.
        """

    @abstractmethod
    def spool(self, tile: Tile, gradients: Mapping[str, Tensor]) -> None:
        """Keep the gradient of a tile's owned elements, from whole gradients by parameter name."""

    @abstractmethod
    def read_state(self, tile: Tile) -> Planes:
        """Every plane of a tile as it is now (no update may be pending)."""

    @abstractmethod
    def write_state(self, tile: Tile, planes: Planes) -> None:
        """Set a tile as it is before any update (rotation 0). Between `begin_filling` and `end_filling`."""

    def set_aside(self) -> None:
        """Keep what the store holds under another name, and begin anew."""

    def drain(self) -> None:
        """Wait until all that was written is in the operating system's hands. Raises BackendError for what failed."""

    def close(self) -> None:
        """Release files and memory; the store can be opened again."""

    # -- the transaction

    @property
    def committed(self) -> Commit:
        """The last commit. Raises BackendError for a store that holds no state."""
        if self.commit is None:
            raise BackendError(
                "the store holds no state: it was never filled, or filling it was interrupted; import a checkpoint"
            )
        return self.commit

    def begin_filling(self, *, set_aside: bool) -> None:
        """Until `end_filling` the store holds no state. set_aside: keep a trained state that it holds now."""
        self.drain()
        if set_aside and self.commit is not None and self.commit.step != self.commit.filled_step:
            self.set_aside()
        self._write_commit(None)

    def end_filling(self, step: int, optimizer_updates: int) -> None:
        self._write_commit(Commit(step, optimizer_updates, None, filled_step=step))
        self.drain()

    def complete_step(self, completed: Completed) -> None:
        """The gradients of a step are spooled; all earlier updates have been made."""
        last = self.committed
        before = last.before if completed.stretch == last.stretch else last.stretch
        self._write_commit(replace(last, before=before, **vars(completed)))

    def needs_update(self, tile: Tile) -> bool:
        return self.commit is not None and self.commit.pending is not None and tile.index >= self.commit.cursor

    def rotation(self, tile: Tile) -> int:
        """How many updates a tile has had since the store was filled."""
        return self.committed.rotation + (tile.index < self.committed.cursor)

    def _updated(self, tile: Tile) -> None:
        """One more tile has had the pending update; after the last one nothing is pending."""
        commit = self.committed
        if tile.index != commit.cursor:  # the transaction relies on this order
            raise BackendError(
                f"tile {tile.index} was updated when tile {commit.cursor} was due: a bug in the schedule"
            )
        if tile.index + 1 == len(self.layout.tiles):
            self._write_commit(replace(commit, rotation=commit.rotation + 1, cursor=0, pending=None))
        else:
            self._write_commit(replace(commit, cursor=tile.index + 1))

    def _write_commit(self, commit: Commit | None) -> None:
        """The new commit: for this process at once, for a restart once all that was written before it has arrived."""
        self.commit = commit


def typed(memory: Tensor, tile: Tile) -> Planes:
    """Planes as views of a tile's bytes."""
    return {
        name: memory[offset : offset + plane.bytes(len(tile.owned))].view(DTYPES[plane.dtype])
        for name, (offset, plane) in tile.plane_offsets().items()
    }


def copy_gradients(tile: Tile, gradients: Mapping[str, Tensor], target: Tensor) -> None:
    """Fill a flat tensor of a tile's owned elements from whole gradients by parameter name."""
    for piece in tile.pieces:
        here, there = tile.owned_part(piece)
        target[here].copy_(gradients[piece.name].reshape(-1)[there])
