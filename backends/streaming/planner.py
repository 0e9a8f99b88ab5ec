"""How long a step takes and what it moves, computed before it starts.

Times are predicted from measured or assumed speeds: a step takes as long as the slowest of computation, disk and link,
which overlap, plus the first record's read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from weftrain.backends.common.alone import MATMUL_SHARE_ON_CPU, UPDATE_BYTES
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
from weftrain.core.flops import training_flops
from weftrain.core.formats.units import gb, gib
from weftrain.core.prediction import Needs, Prediction, Speeds

# A host of 16 cores with a server's memory, and PCIe 5 with 16 lanes, of which a large copy of pinned memory reaches so
# much.
_HOST_BANDWIDTH, _HOST_LINK, _LINK_SHARE = 110e9, 64e9, 0.85
_FORWARD_OF_RECOMPUTED = 0.27  # of a step that runs each block twice forward; the head is not run again
_LABELS = {"update": "update and forward", "resident": "in place"}


def middle_step(options: StreamingOptions, layout: Layout, placement: Placement) -> PassSchedule:
    """A step in the middle of a run, which makes the update of the step before."""
    scheduler = PassScheduler(layout, options.tier, placement, buffer_bytes(layout, options))
    return scheduler.step(first_update=0)


def predict(recipe: Recipe, options: StreamingOptions, speeds: Speeds) -> Prediction:
    """See Predictor.predict: for this machine, or for one device by name in a host of memory_limit_mib. Raises
    BackendError for several devices.
    """
    named = speeds.devices is not None
    if named and (speeds.devices != 1 or recipe.batch.replicas != 1 or not options.memory_limit_mib):
        raise BackendError(
            "the streaming backend predicts for this machine, or for one device by name with the memory of its host: "
            "give --devices 1xNAME, batch.replicas=1 and backend.options.memory_limit_mib"
        )
    layout, device_type = layout_of(recipe, options), "cuda" if named else device_type_of(options)
    device_bytes = device_memory(options, device_type, speeds.capacity_bytes if named else None)
    placement = place(recipe, options, layout, device_type, device_bytes)
    schedule = middle_step(options, layout, placement)
    wanted = needs(recipe, options, layout, placement, device_type)
    if device_type == "cuda":
        times = _on_device_times(recipe, options, placement, schedule, layout, speeds)
    else:
        times = _on_host_times(recipe, options, schedule, layout, speeds)
    first = times.get("first record", 0.0)
    beside = _beside(times)
    limit = max(beside, key=lambda name: beside[name])
    if limit == "compute" and times.get("memory", 0.0) > times.get("compute", 0.0):
        limit = "memory"
    step_s = max(beside.values()) + first
    if "forward" in times:  # updates and the copies before them are beside the forward alone
        forward = {name: times[name] for name in ("forward", "optimizer of the host", "copies before forward")}
        backward = {name: times[name] for name in ("backward", "copies beside backward")}
        step_s = max(max(forward.values()) + max(backward.values()) + times["optimizer of the device"], step_s)
        slowest = max(forward, key=lambda name: forward[name])
        limit = limit if beside[limit] == step_s else "compute" if slowest == "forward" else slowest
    capacity = float(available_memory(options)[0])
    if speeds.capacity_bytes is not None and not named:
        capacity = speeds.capacity_bytes
    found = Prediction(step_s, limit, times, wanted, capacity_bytes=capacity, device_capacity_bytes=device_bytes)
    return found if found.fits else replace(found, remedies=(remedies(recipe, options, not found.fits_device),))


def _beside(times: Mapping[str, float]) -> dict[str, float]:
    """Seconds of what runs at once during the whole step."""
    working = times["forward"] + times["backward"] if "forward" in times else times["compute"] + times["memory"]
    return {"compute": working, "disk": times.get("disk", 0.0), "link": times.get("link", 0.0)}


def _update_bytes(options: StreamingOptions, layout: Layout) -> float:
    """Traffic of the host's memory for the update of a parameter."""
    return UPDATE_BYTES + (40.0 if layout.format.name != "fp32" else 0.0) + (36.0 if options.tier == "mapped" else 0.0)


def _on_host_times(
    recipe: Recipe, options: StreamingOptions, schedule: PassSchedule, layout: Layout, speeds: Speeds
) -> dict[str, float]:
    """Seconds of each part of a step by itself, where the device is the CPU."""
    size = sum(record.size for record in layout.records)
    flops = training_flops(recipe).total * recipe.tokens_per_step
    again = 4 / 3 if options.activations == "recompute" else 1.0
    copied = 2 * (schedule.to_device_bytes + schedule.to_host_bytes)  # to and from a device that memory stands in for
    times = {
        "compute": flops * again / (speeds.matmul_flops * MATMUL_SHARE_ON_CPU),
        "memory": (size * _update_bytes(options, layout) + copied) / speeds.memory_bandwidth,
        **_disk_times(options, schedule, speeds),
    }
    if recipe.batch.replicas > 1 and speeds.link_bandwidth:
        weights = sum(record.compute_bytes for record in layout.records)
        times["link"] = (2 * weights + 4 * size) / speeds.link_bandwidth
    return times


def _disk_times(options: StreamingOptions, schedule: PassSchedule, speeds: Speeds) -> dict[str, float]:
    if options.tier != "direct" or not speeds.disk_bandwidth:
        return {}
    first = next((event.bytes_read for event in schedule.events if event.kind == "update"), 0)
    moved = schedule.bytes_read + schedule.bytes_written
    return {"disk": moved / speeds.disk_bandwidth, "first record": first / speeds.disk_bandwidth}


def _on_device_times(
    recipe: Recipe,
    options: StreamingOptions,
    placement: Placement,
    schedule: PassSchedule,
    layout: Layout,
    speeds: Speeds,
) -> dict[str, float]:
    """The same for a GPU: computation as the cuda backend predicts it for one device, the update of what stays there,
    and beside them the host's AdamW and the copies.
    """
    from weftrain.backends.cuda.degrees import Degrees
    from weftrain.backends.cuda.options import CudaOptions
    from weftrain.backends.cuda.planner import BANDWIDTH_SHARE
    from weftrain.backends.cuda.planner import predict as predict_on_gpus

    checkpointing = "full" if options.activations == "recompute" else "none"
    alike = CudaOptions.model_validate({"activation_checkpointing": checkpointing, "compile": options.compile})
    parts = predict_on_gpus(recipe, alike, Degrees(1, 1, 1, 1), speeds).parts
    computing = sum(seconds for name, seconds in parts.items() if name not in ("optimizer", "communication"))
    kept = sum(record.size for record in layout.records if record.index in placement.states)
    streamed = sum(record.size for record in layout.records) - kept
    link = (speeds.host_link_bandwidth or _HOST_LINK) * _LINK_SHARE
    backward_began = next(n for n, event in enumerate(schedule.events) if event.kind == "loss")
    before, beside = schedule.events[:backward_began], schedule.events[backward_began:]
    forward_share = _FORWARD_OF_RECOMPUTED if options.activations == "recompute" else 1 / 3
    return {
        "forward": computing * forward_share,
        "backward": computing * (1 - forward_share),
        "optimizer of the device": kept * (30 + 2) / (speeds.memory_bandwidth * BANDWIDTH_SHARE),
        "optimizer of the host": streamed * _update_bytes(options, layout) / (speeds.host_bandwidth or _HOST_BANDWIDTH),
        "copies before forward": max(_copied(before)) / link,
        "copies beside backward": max(_copied(beside)) / link,
        **_disk_times(options, schedule, speeds),
    }


def _copied(events: Sequence[Event]) -> tuple[int, int]:
    """Bytes to the device and to the host: the link carries both at once."""
    return sum(event.to_device_bytes for event in events), sum(event.to_host_bytes for event in events)


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
