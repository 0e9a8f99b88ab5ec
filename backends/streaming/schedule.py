"""The order of events of a pass over the model, computed before it runs: what is brought, computed and sent away, and
its bytes. No torch.

    update    bring a record with its state and gradient, apply the pending update, send the state back
    fetch     bring a record's weights alone       (resident: they are still there, or are used where they lie)
    forward   loss   backward      compute         spool: send the gradient away           free: the record's slot may
              be used again

What a reader would get wrong: the bytes are those that the store moves, and the engine holds every pass to them
exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from weftrain.backends.streaming.store.layout import Layout, Record, ahead_tiles

Kind = Literal["update", "fetch", "resident", "forward", "loss", "backward", "spool", "free"]
BRINGING = ("update", "fetch", "resident")


@dataclass(frozen=True)
class Event:
    kind: Kind
    record: Record
    bytes_read: int = 0
    bytes_written: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.record.name}"


@dataclass(frozen=True)
class Schedule:
    """Events in order. Every `update`, `fetch` or `resident` stands before the computation that needs it, every `free`
    after it.
    """

    events: tuple[Event, ...]
    ahead_bytes: int = 0  # of the first record's state, read for the next step when all else has been asked for

    @cached_property
    def bytes_read(self) -> int:
        return self.ahead_bytes + sum(event.bytes_read for event in self.events)

    @cached_property
    def bytes_written(self) -> int:
        return sum(event.bytes_written for event in self.events)


class Scheduler:
    """Builds schedules of one layout. layer_slots: places for layers on their way through (0: weights are used where
    they lie).

    buffer_bytes: tier direct, of state on its way.
    """

    def __init__(self, layout: Layout, tier: str, layer_slots: int, buffer_bytes: int) -> None:
        tiles = ahead_tiles(layout.records[0], buffer_bytes) if tier == "direct" else []
        self._ahead = {tile.index: tile.bytes - tile.compute_bytes for tile in tiles}
        self._layout, self._tier, self._layer_slots = layout, tier, layer_slots
        self.came_ahead = False  # the first record's state was read in the pass before

    def slot(self, record: Record) -> int:
        """Which slot a record takes: layers share a ring, embedding and head have one each; always the same one, so
        what autograd saved of a weight is true again as soon as the record is back.
        """
        last = len(self._layout.records) - 1
        if record.index in (0, last):
            return 0 if record.index == 0 else 1
        return 2 + (record.index - 1) % max(self._layer_slots, 1)

    def step(self, first_update: int | None, spooling: bool = True, read_ahead: bool = False) -> Schedule:
        """One training step. first_update: the first tile that still needs the last step's update. spooling: gradients
        are stored.
        """
        embedding, *layers, head = self._layout.records
        events: list[Event] = []
        for record in (embedding, *layers):
            events += [self._bring(record, first_update), Event("forward", record)]
            if record is not embedding and record.index <= len(layers) - self._layer_slots:
                events.append(Event("free", record))
        events += [
            self._bring(head, first_update),
            Event("loss", head),
            self._spool(head, spooling),
            Event("free", head),
        ]
        for record in reversed(layers):
            stayed = self._layer_slots == 0 or record.index > len(layers) - self._layer_slots
            events += [Event("resident", record) if stayed else self._bring(record, None), Event("backward", record)]
            events += [self._spool(record, spooling), Event("free", record)]
        events += [Event("backward", embedding), self._spool(embedding, spooling), Event("free", embedding)]
        return Schedule(tuple(events), sum(self._ahead.values()) if read_ahead else 0)

    def evaluation(self, first_update: int | None) -> Schedule:
        """A forward pass with the loss and nothing after it."""
        embedding, *layers, head = self._layout.records
        events: list[Event] = []
        for record in (embedding, *layers):
            events += [self._bring(record, first_update), Event("forward", record)]
            events += [] if record is embedding else [Event("free", record)]
        events += [self._bring(head, first_update), Event("loss", head), Event("free", head), Event("free", embedding)]
        return Schedule(tuple(events))

    def flush(self, first_update: int | None) -> Schedule:
        """The pending update of every record that needs it, and no computation."""
        pairs = [(self._bring(record, first_update), Event("free", record)) for record in self._layout.records]
        return Schedule(tuple(event for bring, free in pairs if bring.kind == "update" for event in (bring, free)))

    def _bring(self, record: Record, first_update: int | None) -> Event:
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


def draw(schedule: Schedule, width: int = 100) -> Iterator[str]:
    """The timeline as text: a line a run of like events, with the bytes that the store moves during it."""

    def size(count: int) -> str:
        return f"{count / 2**30:8.2f} GiB" if count >= 2**30 else f"{count / 2**20:8.1f} MiB"

    most = max((event.bytes_read + event.bytes_written for event in schedule.events), default=0) or 1
    yield f"{'':24}{'read':>12} {'written':>12}   one mark a record: # state and gradient, + weights, = gradient, . nothing"
    lines: list[tuple[str, list[Event]]] = []
    for event in schedule.events:
        if event.kind == "free":
            continue
        name = event.record.name.partition(".")[0]
        label = {"update": "update and forward", "fetch": "fetch", "resident": "in place"}.get(event.kind, event.kind)
        label = f"{label} {name}"
        if event.kind in ("forward", "spool") or (event.kind == "backward" and name == "layers"):
            continue  # drawn with what brought the record, or beside it
        if not lines or lines[-1][0] != label:
            lines.append((label, []))
        lines[-1][1].append(event)
    spooled = {event.record.index: event for event in schedule.events if event.kind == "spool"}
    turned = False
    for label, events in lines:
        turned = turned or label.startswith("loss")
        read = sum(event.bytes_read for event in events)
        written = sum(event.bytes_written for event in events)
        marks = "".join("#" if event.kind == "update" else "+" if event.bytes_read else "." for event in events)
        gone = sum(
            spooled[event.record.index].bytes_written for event in events if turned and event.record.index in spooled
        )
        yield f"{label:24}{size(read)} {size(written + gone)}   {marks[:width]}{'=' if gone else ''}"
    yield f"{'a step':24}{size(schedule.bytes_read)} {size(schedule.bytes_written)}   largest event {size(most).strip()}"
