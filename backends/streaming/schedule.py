"""The order of events of a pass over the model, computed before it runs, with the bytes that the store moves for each.
No torch.

    update      load a record's weights, state and gradient, make the pending update, write the state back
    fetch       load a record's weights
    resident    nothing to load: the weights are still in their slot, or are used in the store's memory
    forward, loss, backward    compute with the record's weights
    spool       write the record's gradient to the store
    free        the record's slot may be reused

The executor checks that each pass moves exactly the bytes of its schedule. Of copies to the device it leaves out, and
counts, the weights of experts that no token reached (experts.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from weftrain.backends.streaming.placement import Placement, Slots, gradient_bytes
from weftrain.backends.streaming.store.layout import Layout, Record, ahead_tiles

Kind = Literal["update", "fetch", "resident", "forward", "loss", "backward", "spool", "free"]
LOADING = ("update", "fetch", "resident")
COMPUTING = ("forward", "loss", "backward")


@dataclass(frozen=True)
class Event:
    kind: Kind
    record: Record
    bytes_read: int = 0  # by the store
    bytes_written: int = 0
    to_device_bytes: int = 0  # copied, where the device has a memory of its own
    to_host_bytes: int = 0
    again: bool = False  # the pass has computed with these weights, for which backward comes to them

    def __str__(self) -> str:
        return f"{self.kind} {self.record.name}"


@dataclass(frozen=True)
class PassSchedule:
    """The events of one pass, in order."""

    events: tuple[Event, ...]
    ahead_bytes: int = 0  # of the first tiles' state, read for the next step after all other requests

    @cached_property
    def bytes_read(self) -> int:
        return self.ahead_bytes + sum(event.bytes_read for event in self.events)

    @cached_property
    def bytes_written(self) -> int:
        return sum(event.bytes_written for event in self.events)

    @cached_property
    def to_device_bytes(self) -> int:
        return sum(event.to_device_bytes for event in self.events)

    @cached_property
    def to_host_bytes(self) -> int:
        return sum(event.to_host_bytes for event in self.events)


class PassScheduler:
    """Builds the schedules of one layout.

    buffer_bytes: see Store. ahead: the tiles that are read ahead. came_ahead: they were, during the
    pass before.
    """

    def __init__(self, layout: Layout, tier: str, placement: Placement, buffer_bytes: int) -> None:
        streamed = [tile for tile in layout.tiles if tile.record not in placement.states]
        self.ahead = ahead_tiles(streamed, buffer_bytes) if tier == "direct" else []
        self._ahead = {tile.index: tile.bytes - tile.compute_bytes for tile in self.ahead}
        self._layout, self._tier, self._placement = layout, tier, placement
        self.slots = Slots(layout, placement)
        self.came_ahead = False

    def step(self, first_update: int | None, spooling: bool = True, read_ahead: bool = False) -> PassSchedule:
        """One training step. first_update: the first tile whose update by the last step is pending. spooling: gradients
        go to the store.
        """
        embedding, layers, head = self._layout.records[0], self._layout.trained_through, self._layout.records[-1]
        kept = self.slots.kept_until_backward
        events: list[Event] = []
        for record in (embedding, *layers):
            events += [self._load(record, first_update), Event("forward", record)]
            if record is not embedding and record.index not in kept:
                events += self._free(record)
        if self._layout.ends_at is None:
            events += [self._load(head, first_update), Event("loss", head)]
            events += [self._spool(head, spooling), *self._free(head)]
        for record in reversed(layers):
            if record.index < self._layout.first_trained:  # nothing before it is trained
                events += self._free(record) if record.index in kept else []
                continue
            stayed = self._placement.layer_slots == 0 or record.index in kept
            events += [Event("resident", record) if stayed else self._load(record, None, again=True)]
            events.append(Event("backward", record))
            events += [self._spool(record, spooling), *self._free(record)]
        if not self._layout.first_trained:
            events += [Event("backward", embedding), self._spool(embedding, spooling)]
        events += self._free(embedding)
        return PassSchedule(tuple(events), sum(self._ahead.values()) if read_ahead else 0)

    def evaluation(self, first_update: int | None) -> PassSchedule:
        """A forward pass with the loss."""
        embedding, *layers, head = self._layout.records
        events = [self._load(embedding, first_update), Event("forward", embedding)]
        for record in layers:
            events += [self._load(record, first_update), Event("forward", record), *self._free(record)]
        events += [self._load(head, first_update), Event("loss", head), *self._free(head), *self._free(embedding)]
        return PassSchedule(tuple(events))

    def flush(self, first_update: int | None) -> PassSchedule:
        """The pending update of every record that needs it, and no computation."""
        loads = [self._load(record, first_update, weights=False) for record in self._layout.records]
        due = [load for load in loads if load.kind == "update"]
        return PassSchedule(tuple(event for load in due for event in (load, *self._free(load.record))))

    def _load(self, record: Record, first_update: int | None, weights: bool = True, again: bool = False) -> Event:
        """weights: they are copied to the device, if it has a memory of its own."""
        due = [
            tile for tile in record.tiles if first_update is not None and tile.index >= first_update and tile.trained
        ]
        placed, files = self._placement, self._tier != "ram"
        moved = sum(tile.bytes for tile in due) if files else 0
        if record.index in placed.states:
            written = sum(plane.bytes(len(tile.owned)) for tile in due for plane in tile.planes) if files else 0
            return Event("update" if due else "resident", record, 0, moved, 0, written)
        copied = sum(tile.compute_bytes for tile in record.tiles) if placed.apart and weights else 0
        fetched = sum(tile.compute_bytes for tile in record.tiles if tile not in due) if self._tier == "direct" else 0
        if due:
            gradients = sum(tile.gradient_bytes for tile in due)
            waiting = gradients if record.index in placed.gradients else 0
            came = sum(self._ahead.get(tile.index, 0) for tile in due) if self.came_ahead else 0
            read = fetched + moved + (gradients if files else 0) - came
            return Event("update", record, read, moved, copied, waiting)
        used_in_store = self._tier != "direct" and placed.layer_slots == 0
        return Event("resident" if used_in_store else "fetch", record, fetched, 0, copied, again=again)

    def _spool(self, record: Record, spooling: bool) -> Event:
        if not spooling:
            return Event("spool", record)
        files, placed = self._tier != "ram", self._placement
        moved = sum(tile.gradient_bytes for tile in record.tiles) if files else 0
        leaves = placed.apart and (files or not placed.keeps_gradient(record))
        return Event("spool", record, 0, moved, 0, gradient_bytes(record) if leaves else 0)

    def _free(self, record: Record) -> list[Event]:
        """None for a record that stays on the device."""
        return [] if record.index in self._placement.states else [Event("free", record)]
