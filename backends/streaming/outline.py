"""What `weftrain show --backend streaming` prints: options, sizes, and a step's events with the bytes that the store
moves.
"""

from __future__ import annotations

from collections.abc import Iterator

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.planner import middle_step, needs
from weftrain.backends.streaming.schedule import Event, PassSchedule
from weftrain.core.config import Recipe

_LABELS = {"update": "update and forward", "resident": "in place"}


def outline(recipe: Recipe, options: StreamingOptions) -> list[str]:
    """See Predictor.outline."""
    layout = layout_of(recipe, options)
    wanted, form = needs(recipe, options, layout), layout.format
    memory = " + ".join(f"{name} {size / 2**20:,.0f}" for name, size in wanted.memory_bytes.items())
    return [
        f"streaming    tier {options.tier}, activations {options.activations}; {form.name}: "
        f"{form.bytes_per_parameter(recipe.precision.compute):.4g} B a parameter; exact: {form.exact}",
        f"store        {layout.state_bytes / 1e9:,.2f} GB of state and {layout.gradient_bytes / 1e9:,.2f} GB of "
        f"spooled gradients in {len(layout.tiles)} tiles of {len(layout.records)} records",
        f"memory       {memory} = {wanted.total_memory_bytes / 2**20:,.0f} MiB",
        *draw(middle_step(recipe, options, layout)),
    ]


def draw(schedule: PassSchedule, width: int = 100) -> Iterator[str]:
    """The schedule as text: one line for consecutive events of a kind, with the bytes that the store moves."""
    most = max((event.bytes_read + event.bytes_written for event in schedule.events), default=0) or 1
    marks_are = "one mark a record: # state and gradient, + weights, = gradient, . nothing"
    yield f"{'':24}{'read':>12} {'written':>12}   {marks_are}"
    lines: list[tuple[str, list[Event]]] = []
    for event in schedule.events:
        name = event.record.name.partition(".")[0]
        if event.kind in ("free", "forward", "spool") or (event.kind == "backward" and name == "layers"):
            continue  # drawn in the line of the event that loaded the record
        label = f"{_LABELS.get(event.kind, event.kind)} {name}"
        if not lines or lines[-1][0] != label:
            lines.append((label, []))
        lines[-1][1].append(event)
    spooled = {event.record.index: event.bytes_written for event in schedule.events if event.kind == "spool"}
    in_backward = False
    for label, events in lines:
        in_backward = in_backward or label.startswith("loss")
        read = sum(event.bytes_read for event in events)
        written = sum(event.bytes_written for event in events)
        marks = "".join("#" if event.kind == "update" else "+" if event.bytes_read else "." for event in events)
        sent = sum(spooled.get(event.record.index, 0) for event in events) if in_backward else 0
        yield f"{label:24}{_size(read)} {_size(written + sent)}   {marks[:width]}{'=' if sent else ''}"
    total = f"{_size(schedule.bytes_read)} {_size(schedule.bytes_written)}"
    yield f"{'a step':24}{total}   largest event {_size(most).strip()}"


def _size(count: int) -> str:
    return f"{count / 2**30:8.2f} GiB" if count >= 2**30 else f"{count / 2**20:8.1f} MiB"
