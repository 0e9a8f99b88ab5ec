"""The order of events of a pass over the model, computed before it runs, with the bytes that the store moves for each.
No torch.

    update      load a record's weights, state and gradient, make the pending update, write the state back
    fetch       load a record's weights
    resident    nothing to load: the weights are still in their slot, or are used in the store's memory
    forward, loss, backward    compute with the record's weights
    spool       write the record's gradient to the store
    free        the record's slot may be reused

The executor checks that each pass moves exactly the bytes of its schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from weftrain.backends.streaming.store.layout import Layout, Record, ahead_tiles

Kind = Literal["update", "fetch", "resident", "forward", "loss", "backward", "spool", "free"]
LOADING = ("update", "fetch", "resident")
COMPUTING = ("forward", "loss", "backward")


@dataclass(frozen=True)
class Event:
    kind: Kind
    record: Record
    bytes_read: int = 0
    bytes_written: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.record.name}"


@dataclass(frozen=True)
class PassSchedule:
    """The events of one pass, in order."""

    events: tuple[Event, ...]
    ahead_bytes: int = 0  # of the first record's state, read for the next step after all other requests

    @cached_property
    def bytes_read(self) -> int:
        return self.ahead_bytes + sum(event.bytes_read for event in self.events)

    @cached_property
    def bytes_written(self) -> int:
        return sum(event.bytes_written for event in self.events)


class PassScheduler:
    """Builds the schedules of one layout.

    layer_slots: slots that layers share; 0: weights are used in the store's memory. buffer_bytes: see Store.
    came_ahead: the first record's state was read during the pass before.
    """

    def __init__(self, layout: Layout, tier: str, layer_slots: int, buffer_bytes: int) -> None:
        tiles = ahead_tiles(layout.records[0], buffer_bytes) if tier == "direct" else []
        self._ahead = {tile.index: tile.bytes - tile.compute_bytes for tile in tiles}
        self._layout, self._tier, self._layer_slots = layout, tier, layer_slots
        self.came_ahead = False

    def slot(self, record: Record) -> int:
        """The number of a record's slot, which never changes: embedding and head have one each, layers share the
        others in turn.
        """
        if record.index in (0, len(self._layout.records) - 1):
            return min(record.index, 1)
        return 2 + (record.index - 1) % max(self._layer_slots, 1)

    def step(self, first_update: int | None, spooling: bool = True, read_ahead: bool = False) -> PassSchedule:
        """One training step. first_update: the first tile whose update by the last step is pending. spooling: gradients
        go to the store.
        """
        embedding, *layers, head = self._layout.records
        last_freed = len(layers) - self._layer_slots  # later layers stay in their slots until their backward
        events: list[Event] = []
        for record in (embedding, *layers):
            events += [self._load(record, first_update), Event("forward", record)]
            if record is not embedding and record.index <= last_freed:
                events.append(Event("free", record))
        events += [self._load(head, first_update), Event("loss", head)]
        events += [self._spool(head, spooling), Event("free", head)]
        for record in reversed(layers):
            stayed = self._layer_slots == 0 or record.index > last_freed
            events += [Event("resident", record) if stayed else self._load(record, None), Event("backward", record)]
            events += [self._spool(record, spooling), Event("free", record)]
        events += [Event("backward", embedding), self._spool(embedding, spooling), Event("free", embedding)]
        return PassSchedule(tuple(events), sum(self._ahead.values()) if read_ahead else 0)

    def evaluation(self, first_update: int | None) -> PassSchedule:
        """A forward pass with the loss."""
        embedding, *layers, head = self._layout.records
        events = [self._load(embedding, first_update), Event("forward", embedding)]
        for record in layers:
            events += [self._load(record, first_update), Event("forward", record), Event("free", record)]
        events += [self._load(head, first_update), Event("loss", head), Event("free", head), Event("free", embedding)]
        return PassSchedule(tuple(events))

    def flush(self, first_update: int | None) -> PassSchedule:
        """The pending update of every record that needs it, and no computation."""
        pairs = [(self._load(record, first_update), Event("free", record)) for record in self._layout.records]
        return PassSchedule(tuple(event for load, free in pairs if load.kind == "update" for event in (load, free)))

    def _load(self, record: Record, first_update: int | None) -> Event:
        due = [tile for tile in record.tiles if first_update is not None and tile.index >= first_update]
        fetched = sum(tile.compute_bytes for tile in record.tiles if tile not in due) if self._tier == "direct" else 0
        if due:
            moved = sum(tile.bytes for tile in due) if self._tier != "ram" else 0
            gradients = sum(tile.gradient_bytes for tile in due) if self._tier != "ram" else 0
            came = sum(self._ahead.get(tile.index, 0) for tile in due) if self.came_ahead else 0
            return Event("update", record, fetched + moved + gradients - came, moved)
        return Event("resident" if self._tier != "direct" and self._layer_slots == 0 else "fetch", record, fetched)

    def _spool(self, record: Record, spooling: bool) -> Event:
        moved = sum(tile.gradient_bytes for tile in record.tiles) if spooling and self._tier != "ram" else 0
        return Event("spool", record, 0, moved)
