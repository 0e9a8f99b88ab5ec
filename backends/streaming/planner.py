"""How long a step takes and what it moves, computed before it starts.

Times are predicted from measured or assumed speeds: a step takes as long as the slowest of computation, disk and link,
which overlap, plus the first record's read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from weftrain.backends.streaming.needs import (
    available_memory,
    device_memory,
    device_type_of,
    memory_parts,
    needs,
    place,
    remedies,
)
from weftrain.backends.streaming.options import (
    StreamingOptions,
    buffer_bytes,
    layout_of,
)
from weftrain.backends.streaming.placement import Placement
from weftrain.backends.streaming.schedule import Event, PassSchedule, PassScheduler
from weftrain.backends.streaming.store.layout import Layout
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.units import gb, gib
from weftrain.core.parameters import flops_per_token
from weftrain.core.prediction import Needs, Prediction, Speeds

# Model FLOP/s over the measured peak, in the steps of bench_70m on two cores: 0.79 in bf16, 0.74 in fp32.
_EFFICIENCY = 0.75
_LABELS = {"update": "update and forward", "resident": "in place"}


def middle_step(options: StreamingOptions, layout: Layout, placement: Placement) -> PassSchedule:
    """A step in the middle of a run, which makes the update of the step before."""
    scheduler = PassScheduler(layout, options.tier, placement, buffer_bytes(layout, options))
    return scheduler.step(first_update=0)


def predict(recipe: Recipe, options: StreamingOptions, speeds: Speeds) -> Prediction:
    """See Predictor.predict: for this machine's memory and disk. Raises BackendError if devices are named."""
    if speeds.devices is not None:
        raise BackendError(
            "the streaming backend predicts for this machine, with its memory and disk: leave the devices out"
        )
    layout, device_type = layout_of(recipe, options), device_type_of(options)
    device_bytes = device_memory(options, device_type)
    placement = place(recipe, options, layout, device_type, device_bytes)
    schedule, size = middle_step(options, layout, placement), sum(record.size for record in layout.records)
    flops = flops_per_token(recipe.model, recipe.data.sequence_length) * recipe.tokens_per_step
    again = 4 / 3 if options.activations == "recompute" else 1.0
    passes = 28.0 + (40.0 if layout.format.name != "fp32" else 0.0) + (36.0 if options.tier == "mapped" else 0.0)
    times = {
        "compute": flops * again / (speeds.matmul_flops * _EFFICIENCY),
        "memory": size * passes / speeds.memory_bandwidth,
    }
    if options.tier == "direct" and speeds.disk_bandwidth:
        times["disk"] = (schedule.bytes_read + schedule.bytes_written) / speeds.disk_bandwidth
        first = next(event for event in schedule.events if event.kind == "update")
        times["first record"] = first.bytes_read / speeds.disk_bandwidth
    if recipe.batch.replicas > 1 and speeds.link_bandwidth:
        weights = sum(record.compute_bytes for record in layout.records)
        times["link"] = (2 * weights + 4 * size) / speeds.link_bandwidth
    working = times["compute"] + times["memory"]
    slowest = {"compute": working, "disk": times.get("disk", 0.0), "link": times.get("link", 0.0)}
    limit = max(slowest, key=lambda name: slowest[name])
    if limit == "compute" and times["memory"] > times["compute"]:
        limit = "memory"
    step_s = max(slowest.values()) + times.get("first record", 0.0)
    capacity = available_memory(options)[0] if speeds.capacity_bytes is None else speeds.capacity_bytes
    wanted = needs(recipe, options, layout, placement, device_type)
    found = Prediction(step_s, limit, times, wanted, capacity_bytes=capacity, device_capacity_bytes=device_bytes)
    return found if found.fits else replace(found, remedies=(remedies(recipe, options),))


def outline(recipe: Recipe, options: StreamingOptions) -> list[str]:
    """See Predictor.outline."""
    layout, device_type = layout_of(recipe, options), device_type_of(options)
    placement = place(recipe, options, layout, device_type, device_memory(options, device_type))
    wanted, form = needs(recipe, options, layout, placement, device_type), layout.format
    return [
        f"streaming    tier {options.tier}, activations {options.activations}; {form.name}: "
        f"{form.bytes_per_parameter(recipe.precision.compute):.4g} B a parameter; exact: {form.exact}",
        f"store        {gb(layout.state_bytes)} of state and {gb(layout.gradient_bytes)} of "
        f"spooled gradients in {len(layout.tiles)} tiles of {len(layout.records)} records",
        f"memory       {' + '.join(memory_parts(wanted.memory_bytes))} = {gib(wanted.total_memory_bytes)}",
        *_on_device(layout, placement, wanted),
        *draw(middle_step(options, layout, placement)),
    ]


def _on_device(layout: Layout, placement: Placement, wanted: Needs) -> Iterator[str]:
    if placement.apart:
        yield f"device       {' + '.join(memory_parts(wanted.device_bytes))} = {gib(wanted.total_device_bytes)}"
        layers, outer = layout.records[1:-1], (layout.records[0], layout.records[-1])
        kept = [f"{sum(record.index in placement.states for record in layers)} of {len(layers)} layers"]
        kept += [f"the {record.name}" for record in outer if record.index in placement.states]
        yield f"kept there   {', '.join(kept)}; and the gradients of {len(placement.gradients)} other records"


def draw(schedule: PassSchedule, width: int = 100) -> Iterator[str]:
    """The schedule as text: one line for consecutive events of a kind, with the bytes that the store moves."""
    most = max((event.bytes_read + event.bytes_written for event in schedule.events), default=0)
    marks_are = "one mark a record: # state and gradient, + weights, = gradient, . nothing"
    yield f"{'':28}{'read':>13} {'written':>13}   {marks_are}"
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
        yield f"{label:28}{gb(read):>13} {gb(written + sent):>13}   {marks[:width]}{'=' if sent else ''}"
    total = f"{gb(schedule.bytes_read):>13} {gb(schedule.bytes_written):>13}"
    yield f"{'a step':28}{total}   largest event {gb(most)}"
    if schedule.to_device_bytes or schedule.to_host_bytes:
        copied = f"{gb(schedule.to_device_bytes):>13} {gb(schedule.to_host_bytes):>13}"
        yield f"{'copied':28}{copied}   to the device and back"
