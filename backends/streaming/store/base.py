"""The store: weights, optimizer state and spooled gradients off the device, and the promise that a step is a
transaction.

    ram      tensors of this process; updated in place; nothing survives the process (here)
    mapped   a file mapped into memory: weights are used where they lie, in the page cache (file_store.py)
    direct   a file read and written past the page cache, into buffers that are used again: no more memory than the
             schedule asks for
             (direct_store.py)

What a reader would get wrong: nothing undoes and nothing logs. An update writes a tile beside its old version
(layout.py), a gradient lies in a place of its own until every tile was updated with it, and `commit` says how many
steps are complete and how many tiles have had the last update. A process killed at any instant leaves old or new tiles,
and the commit that says which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

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
# One part of a tile to update: first and last element (of the owned ones), planes to change in place, and the gradient
# of those elements.
Part = tuple[int, int, Planes, Tensor]


@dataclass(frozen=True)
class Pending:
    """The update that follows from the last step, decided and not yet made everywhere."""

    gradient_scale: float
    learning_rates: dict[str, float]
    update_index: int


@dataclass(frozen=True)
class Completed:
    """A step that is complete. `step` counts it. stretch: Job.segment. result: of the step, as JSON: see state.py."""

    step: int
    optimizer_updates: int
    pending: Pending | None
    dataset_id: str | None
    stretch: str
    result: dict[str, Any] | None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Completed:
        """From what `dataclasses.asdict` made."""
        pending = values["pending"]
        return cls(**{**values, "pending": None if pending is None else Pending(**pending)})


@dataclass(frozen=True)
class Commit:
    """Where the store stands. `cursor` tiles have had the pending update; `rotation` counts those that all tiles have
    had.
    """

    step: int
    optimizer_updates: int
    rotation: int
    cursor: int
    pending: Pending | None
    filled_step: int  # where it stood when it was filled: what is beyond is training that no checkpoint need have
    dataset_id: str | None = None
    stretch: str = ""  # Job.segment of the process that completed the last step,
    before: str = ""  # and of the one before that
    result: dict[str, Any] | None = None  # of the last step, as JSON: see state.py
    sequence: int = 0
    boot_id: str = ""
    closed: bool = False


def no_trace(track: str, name: str, start_s: float, end_s: float) -> None:
    """Nobody wants a timeline."""


class Store(ABC):
    """What the three tiers share. Names in gradients and states are canonical parameter names; all memory is the
    host's.
    """

    tier = ""
    buffer_bytes = 0  # of state on its way in or out

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.commit: Commit | None = None  # None: holds no state yet
        self.bytes_read = self.bytes_written = 0  # asked for, in all
        self.stall_s = self.io_s = 0.0  # waited for by the engine; spent by the disk (reads and writes, each by itself)
        self.trace: Callable[[str, str, float, float], None] = no_trace  # track, name, start and end in seconds

    # -- what differs from tier to tier

    def prefetch(self, record: Record, slot: Tensor | None, with_state: bool) -> None:
        """Begin to bring a record: its weights, and where with_state all that an update needs."""

    # whether what the first record's next update needs, beyond weights and gradient, is here or on its way
    ahead = False

    def read_ahead(self, record: Record) -> None:
        """Begin to bring the first record's state for the step after this one, while this one still computes."""

    def drop_ahead(self) -> None:
        """No update comes: what was read ahead is not needed."""

    @abstractmethod
    def compute_planes(self, record: Record) -> list[Tensor]:
        """Of each tile of a fetched record, the owned elements of the weights in the compute dtype, flat."""

    @abstractmethod
    def updating(self, tile: Tile) -> Iterator[Part]:
        """The parts of a tile, to be updated in place one by one; the tile counts as updated when the iterator is
        exhausted.
        """

    @abstractmethod
    def spool(self, tile: Tile, gradient: Callable[[Tensor], None]) -> None:
        """Keep a tile's gradient: `gradient` fills a flat tensor of the owned elements."""

    @abstractmethod
    def read_state(self, tile: Tile) -> Planes:
        """Every plane of a tile as it is now (no update may be pending)."""

    @abstractmethod
    def write_state(self, tile: Tile, planes: Planes) -> None:
        """Set a tile as it is before any update (rotation 0). Between `begin_filling` and `end_filling`."""

    def drain(self) -> None:
        """Wait until all that was written is in the system's hands. Raises BackendError for what failed."""

    def close(self) -> None:
        """Let go of files and memory; the store can be opened again."""

    # -- the transaction

    def begin_filling(self, *, set_aside: bool) -> None:
        """The store is about to be filled: until `end_filling` it holds no state.

        set_aside: what it holds now, if it was trained, is kept under another name.
        """
        self.drain()
        if set_aside and self.commit is not None and self.commit.step != self.commit.filled_step:
            self.set_aside()
        self._record(None)

    def set_aside(self) -> None:
        """Keep what the store holds under another name, and begin anew."""

    def end_filling(self, step: int, optimizer_updates: int) -> None:
        self._record(Commit(step, optimizer_updates, 0, 0, None, filled_step=step))
        self.drain()

    def complete_step(self, completed: Completed) -> None:
        """The gradients of a step are spooled; all earlier updates have been made."""
        before = self.standing()
        commit = replace(
            before,
            step=completed.step,
            optimizer_updates=completed.optimizer_updates,
            pending=completed.pending,
            dataset_id=completed.dataset_id,
            result=completed.result,
        )
        if completed.stretch != before.stretch:
            commit = replace(commit, stretch=completed.stretch, before=before.stretch)
        self._record(commit)

    def needs_update(self, tile: Tile) -> bool:
        return self.commit is not None and self.commit.pending is not None and tile.index >= self.commit.cursor

    def rotation(self, tile: Tile) -> int:
        """How many updates a tile has had since the store was filled."""
        commit = self.standing()
        return commit.rotation + (tile.index < commit.cursor)

    def _updated(self, tile: Tile) -> None:
        """One more tile has had the pending update; after the last one nothing is pending."""
        commit = self.standing()
        if tile.index != commit.cursor:  # the whole promise hangs on this order
            raise BackendError(
                f"tile {tile.index} was updated when tile {commit.cursor} was due: a defect of the schedule"
            )
        last = tile.index + 1 == len(self.layout.tiles)
        done = (
            replace(commit, rotation=commit.rotation + 1, cursor=0, pending=None)
            if last
            else replace(commit, cursor=tile.index + 1)
        )
        self._record(done)

    def standing(self) -> Commit:
        if self.commit is None:
            raise BackendError(
                "the store holds no state: it was never filled, or filling it was interrupted; import a checkpoint"
            )
        return self.commit

    def _record(self, commit: Commit | None) -> None:
        """The new standing, for this process at once; for a restart when all that was written before it has arrived."""
        self.commit = commit


def typed(memory: Tensor, tile: Tile) -> Planes:
    """Planes as views of a tile's bytes."""
    found = {}
    for name, (offset, plane) in tile.plane_offsets().items():
        found[name] = memory[offset : offset + plane.bytes(len(tile.owned))].view(DTYPES[plane.dtype])
    return found


class RamStore(Store):
    tier = "ram"

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._planes: dict[int, Planes] = {}
        self._gradients: dict[int, Tensor] = {}

    def compute_planes(self, record: Record) -> list[Tensor]:
        return [self._planes[tile.index][tile.planes[0].name] for tile in record.tiles]

    def updating(self, tile: Tile) -> Iterator[Part]:
        yield 0, len(tile.owned), self._planes[tile.index], self._gradients[tile.index]
        self._updated(tile)

    def spool(self, tile: Tile, gradient: Callable[[Tensor], None]) -> None:
        if tile.index not in self._gradients:
            self._gradients[tile.index] = torch.zeros(len(tile.owned), dtype=DTYPES[tile.gradient_dtype])
        gradient(self._gradients[tile.index])

    def read_state(self, tile: Tile) -> Planes:
        return self._planes[tile.index]

    def write_state(self, tile: Tile, planes: Planes) -> None:
        if tile.index not in self._planes:
            pinned = torch.cuda.is_available()  # copies to a device then run beside its computation
            self._planes[tile.index] = {
                name: torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned) for name, p in planes.items()
            }
        for name, plane in planes.items():
            self._planes[tile.index][name].copy_(plane)

    def close(self) -> None:
        self._planes, self._gradients = {}, {}


class EmptyStore(RamStore):
    """Of a rank that holds no state: others send it what it needs."""

    def compute_planes(self, record: Record) -> list[Tensor]:
        return []
