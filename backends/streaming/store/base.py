"""The store: weights, optimizer state and spooled gradients in host memory or in a file. Each step is a transaction.

    ram      tensors of this process, updated in place; nothing survives the process (ram.py)
    mapped   a file mapped into memory: weights are used in the page cache, without a copy (mapped.py)
    direct   a file read and written past the page cache through reused buffers, so memory is bounded (direct.py)

There is no undo and no log. An update writes a tile beside its old version (layout.py), a gradient has a place of its
own until every tile was updated with it, and the `Commit` says how many steps are complete and how many tiles have had
the last update. A process killed at any instant leaves old or new tiles, and the commit that says which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self

from torch import Tensor

from weftrain.backends.streaming.store.layout import Layout, Record, Tile
from weftrain.backends.streaming.store.planes import Planes
from weftrain.core.errors import BackendError


class KeptOnDevice(Protocol):
    """What a store asks of the state that stays in device memory (device_state.py)."""

    def keeps(self, tile: Tile) -> bool: ...
    def keeps_gradient(self, tile: Tile) -> bool: ...
    def planes(self, tile: Tile) -> Planes: ...
    def put(self, tile: Tile, planes: Planes) -> None: ...
    def gradient_on_host(self, tile: Tile) -> Tensor: ...
    def clear(self) -> None: ...


class UpdateRange(NamedTuple):
    """Owned elements start..stop of a tile, to be updated at once."""

    start: int
    stop: int
    planes: Planes  # the whole tile's, changed in place
    gradient: Tensor  # [stop - start]


@dataclass(frozen=True)
class Pending:
    """The update by the last step's gradients: decided, but not yet made on every tile. optimizer: the keys of the
    recipe that the step was computed by, since the process that makes the update may have been given others; None in
    stores of earlier versions, which then take those that were given.
    """

    gradient_scale: float
    learning_rates: dict[str, float]
    update_index: int
    optimizer: dict[str, Any] | None = None


@dataclass(frozen=True)
class Completed:
    """What rank 0 says of a completed step."""

    step: int  # this one included
    optimizer_updates: int
    pending: Pending | None
    dataset_id: str | None = None
    stretch: str = ""  # Job.segment of the process that completed the step
    result: dict[str, Any] | None = None  # the StepResult as JSON, see state.py

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` made."""
        pending = values["pending"]
        return cls(**{**values, "pending": None if pending is None else Pending(**pending)})


@dataclass(frozen=True)
class Commit(Completed):
    """The store's position: its last completed step, and how far the pending update has come. The fields are the keys
    of the commit page on disk.
    """

    before: str = ""  # `stretch` of the process before the one that completed the last step
    rotation: int = 0  # updates that every tile has had
    cursor: int = 0  # tiles that have had the pending update as well
    filled_step: int = 0  # the step at which the store was filled: later steps may be in no checkpoint
    sequence: int = 0
    boot_id: str = ""
    closed: bool = False


def no_trace(track: str, name: str, start_s: float, end_s: float) -> None:
    """Records no timeline."""


class Store(ABC):
    """What the three tiers have in common."""

    tier = ""
    buffer_bytes = 0  # for state in flight
    has_read_ahead = False  # the first tiles' state for their next update has been requested

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.commit: Commit | None = None  # None: holds no state yet
        self.bytes_read = self.bytes_written = 0  # requested, in total
        self.stall_s = self.io_s = 0.0  # the executor's wait for the disk; the disk's time, summed over all requests
        self.trace: Callable[[str, str, float, float], None] = no_trace  # track, name, start and end in seconds
        self.device_state: KeptOnDevice | None = None  # what stays on the device; None: nothing does

    # -- what differs from tier to tier

    def prefetch(self, record: Record, slot: Tensor | None, with_state: bool) -> None:
        """Begin to load a record: its weights, and if with_state all that an update needs."""

    def read_ahead(self, tiles: Iterable[Tile]) -> None:
        """Begin to load the first tiles' state for the next step while this one still computes."""

    def drop_ahead(self) -> None:
        """No update follows: release what was read ahead."""

    @abstractmethod
    def compute_planes(self, record: Record) -> list[Tensor]:
        """For each tile of a loaded record its owned weights in the compute dtype, flat."""

    @abstractmethod
    def updating(self, tile: Tile) -> Iterator[UpdateRange]:
        """The ranges of a tile, each updated before the next is requested; the tile counts as updated at the end."""

    @abstractmethod
    def write_updated(self, tile: Tile, planes: Planes) -> None:
        """Write the state of a tile that was updated in device memory; the tile counts as updated."""

    @abstractmethod
    def spool(self, tile: Tile, gradients: Mapping[str, Tensor]) -> None:
        """Keep the gradient of a tile's owned elements, from whole gradients by parameter name."""

    @abstractmethod
    def read_state(self, tile: Tile) -> Planes:
        """Every plane of a tile. No update may be pending."""

    def read_gradient(self, tile: Tile) -> Tensor:
        """The gradient of a tile's pending update, [owned elements]: where a run continues from a file."""
        raise BackendError(f"tier {self.tier} keeps no gradient that another process could read")

    @abstractmethod
    def write_state(self, tile: Tile, planes: Planes) -> None:
        """Write a tile's initial state (rotation 0), between `begin_filling` and `end_filling`."""

    def set_aside(self) -> None:
        """Keep the store's contents under another name, and begin an empty one."""

    def drain(self) -> None:
        """Wait until every write has been handed to the operating system. Raises BackendError if one failed."""

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
        """Until `end_filling` the store holds no state. set_aside: keep a trained state under another name."""
        self.drain()
        if set_aside and self.commit is not None and self.commit.step != self.commit.filled_step:
            self.set_aside()
        if self.device_state is not None:
            self.device_state.clear()
        self._write_commit(None)

    def end_filling(self, step: int, optimizer_updates: int) -> None:
        self._write_commit(Commit(step, optimizer_updates, None, filled_step=step))
        self.drain()

    def complete_step(self, completed: Completed) -> None:
        """Commit a step: its gradients are spooled, and all earlier updates have been made."""
        last = self.committed
        before = last.before if completed.stretch == last.stretch else last.stretch
        self._write_commit(replace(last, before=before, **vars(completed)))

    def needs_update(self, tile: Tile) -> bool:
        commit = self.commit
        return tile.trained and commit is not None and commit.pending is not None and tile.index >= commit.cursor

    def rotation(self, tile: Tile) -> int:
        """How many updates a tile has had since the store was filled; a frozen one has none."""
        if not tile.trained:
            return 0
        commit = self.committed  # read once: another thread may be updating tiles
        return commit.rotation + (tile.index < commit.cursor)

    def _updated(self, tile: Tile) -> None:
        """One more tile has had the pending update; after the last one nothing is pending."""
        commit = self.committed
        due = self.layout.next_trained(commit.cursor)
        if tile.index != due:  # the transaction relies on this order
            raise BackendError(f"tile {tile.index} was updated when tile {due} was due: a bug in the schedule")
        if self.layout.next_trained(tile.index + 1) is None:
            self._write_commit(replace(commit, rotation=commit.rotation + 1, cursor=0, pending=None))
        else:
            self._write_commit(replace(commit, cursor=tile.index + 1))

    def _write_commit(self, commit: Commit | None) -> None:
        """The new commit takes effect at once in this process; on disk after every earlier write."""
        self.commit = commit


def copy_gradients(tile: Tile, gradients: Mapping[str, Tensor], target: Tensor, part: slice = slice(0, None)) -> None:
    """Fill a flat tensor of a tile's owned elements, or a part of it, from whole gradients by parameter name."""
    stop = target.numel() if part.stop is None else part.stop
    for fragment in tile.fragments:
        here, there = tile.owned_part(fragment)
        first, last = max(here.start, part.start), min(here.stop, stop)
        if first < last:
            source = gradients[fragment.name].reshape(-1)[there.start + first - here.start :][: last - first]
            target[first:last].copy_(source, non_blocking=True)
