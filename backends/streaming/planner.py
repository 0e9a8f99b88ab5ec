"""The memory and disk that a run needs, how long a step takes and what it moves, computed before it starts.

Memory and disk follow from the layout and are upper bounds. Times are predicted from measured (or assumed) speeds: a
step takes as long as the slowest of computation, disk and link, which overlap, plus the first record's read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import psutil

from weftrain.backends.streaming.options import StreamingOptions, buffer_bytes, layer_slots, layout_of
from weftrain.backends.streaming.schedule import Event, PassSchedule, PassScheduler
from weftrain.backends.streaming.store.layout import Layout
from weftrain.backends.streaming.store.state_format import ITEM_BYTES
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.units import gb, gib
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import flops_per_token
from weftrain.core.prediction import Needs, Prediction, Speeds

_BASE_BYTES = 400 << 20  # the interpreter, torch and generated code; importing torch alone takes 220 MiB
_LOGIT_CHUNK_BYTES = 6 << 24  # of a chunked head: 2^24 logits, in bf16 and in fp32
# Model FLOP/s over the measured peak, in the steps of bench_70m on two cores: 0.79 in bf16, 0.74 in fp32.
_EFFICIENCY = 0.75
_LABELS = {"update": "update and forward", "resident": "in place"}


def needs(recipe: Recipe, options: StreamingOptions, layout: Layout) -> Needs:
    """Memory and disk of one process."""
    model, compute, recompute = recipe.model, recipe.precision.compute, options.activations == "recompute"
    item, ram, slots = ITEM_BYTES[compute], options.tier == "ram", layer_slots(recipe, options)
    micro = recipe.batch.micro_batch_size * recipe.data.sequence_length
    tokens = recipe.batch.global_batch_size * recipe.data.sequence_length
    layers = layout.records[1:-1]
    largest = max(record.size for record in layers)
    stream = tokens * model.hidden_size * 4
    block = micro * kept_by_a_block(model, recipe.data.sequence_length, item)
    accumulated = 4 if recipe.batch.global_batch_size > recipe.batch.micro_batch_size else item
    head = layout.records[0] if model.tie_embeddings else layout.records[-1]
    vocabulary = model.vocab_size * model.hidden_size
    parts = {
        "program": _BASE_BYTES,
        "activations": stream * (model.num_layers + 2) if recompute else block * model.num_layers * tokens // micro,
        "one block at work": 2 * block,
        "gradients of a layer": 2 * largest * accumulated,
        "head": vocabulary * (4 + 2 * accumulated) + _LOGIT_CHUNK_BYTES,
    }
    if slots:
        parts["weights"] = slots * max(record.compute_bytes for record in layers) + layout.records[0].compute_bytes
        parts["weights"] += 0 if head is layout.records[0] else head.compute_bytes
    if options.tier == "direct":
        parts["buffers"] = 2 * buffer_bytes(layout, options)
    if ram:
        parts["store"] = sum(tile.bytes + tile.gradient_bytes for tile in layout.tiles)
    return Needs(parts, 0 if ram else layout.file_bytes)


def kept_by_a_block(model: ModelConfig, length: int, item: int) -> int:
    """Bytes that autograd keeps of a block for each token. item: bytes of an activation.

    In fp32 the residual stream twice and the norms' results; in the compute dtype those results again, q, k and v, what
    attention gives and, of rows up to 1,024 tokens, its probabilities; and the FFN.
    """
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    heads = 2 * (queries + keys) + (model.num_heads * length if length <= 1024 else 0)
    inner = (4 if model.feed_forward == "swiglu" else 2) * model.intermediate_size
    branches = 2 * model.hidden_size if model.norm_placement == "after" else 0
    statistics = 4 * 4
    if model.qk_norm != "none":
        heads += 2 * (queries + keys)
        statistics += 2 * 4 * (model.num_heads + model.num_kv_heads)
    return 16 * model.hidden_size + item * (2 * model.hidden_size + heads + inner + branches) + statistics


def middle_step(recipe: Recipe, options: StreamingOptions, layout: Layout) -> PassSchedule:
    """A step in the middle of a run, which makes the update of the step before."""
    scheduler = PassScheduler(layout, options.tier, layer_slots(recipe, options), buffer_bytes(layout, options))
    return scheduler.step(first_update=0)


def predict(recipe: Recipe, options: StreamingOptions, speeds: Speeds) -> Prediction:
    """See Predictor.predict: for this machine's memory and disk. Raises BackendError if devices are named."""
    if speeds.devices is not None:
        raise BackendError(
            "the streaming backend predicts for this machine, with its memory and disk: leave the devices out"
        )
    layout = layout_of(recipe, options)
    schedule, size = middle_step(recipe, options, layout), sum(record.size for record in layout.records)
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
    capacity = _available_memory(options)[0] if speeds.capacity_bytes is None else speeds.capacity_bytes
    found = Prediction(step_s, limit, times, needs(recipe, options, layout), capacity_bytes=capacity)
    return found if found.fits else replace(found, remedies=(remedies(recipe, options),))


def check_memory(recipe: Recipe, options: StreamingOptions, layout: Layout) -> None:
    """Raises BackendError for a run that does not fit this machine's memory, with remedies."""
    wanted = needs(recipe, options, layout)
    available, limited_by = _available_memory(options)
    if wanted.total_memory_bytes > available:
        parts = ", ".join(_memory_parts(wanted))
        raise BackendError(
            f"the run needs about {gib(wanted.total_memory_bytes)} of memory ({parts}), "
            f"{gib(available)} {limited_by}: {remedies(recipe, options)}"
        )


def _available_memory(options: StreamingOptions) -> tuple[int, str]:
    """Bytes of memory that a run may take, and for a message what limits them."""
    if options.memory_limit_mib:
        return options.memory_limit_mib << 20, "backend.options.memory_limit_mib allows"
    return psutil.virtual_memory().available, "are available"


def remedies(recipe: Recipe, options: StreamingOptions) -> str:
    """What would make a run fit, the cheapest first."""
    choices = {
        "backend.options.tier=direct (state on disk)": options.tier == "ram",
        "backend.options.activations=recompute (a third more arithmetic)": options.activations == "keep",
        "backend.options.layer_slots=2": options.layer_slots > 2,
        "a smaller backend.options.tile_elements": options.tier == "direct" and not options.buffer_mib,
        "batch.micro_batch_size=1": recipe.batch.micro_batch_size > 1,
        "precision.compute=bfloat16": recipe.precision.compute == "float32",
    }
    found = [remedy for remedy, helps in choices.items() if helps]
    return ", ".join(found) or "a smaller model, or a machine with more memory"


def _memory_parts(wanted: Needs) -> list[str]:
    return [f"{name} {gib(size)}" for name, size in wanted.memory_bytes.items()]


def outline(recipe: Recipe, options: StreamingOptions) -> list[str]:
    """See Predictor.outline."""
    layout = layout_of(recipe, options)
    wanted, form = needs(recipe, options, layout), layout.format
    memory = " + ".join(_memory_parts(wanted))
    return [
        f"streaming    tier {options.tier}, activations {options.activations}; {form.name}: "
        f"{form.bytes_per_parameter(recipe.precision.compute):.4g} B a parameter; exact: {form.exact}",
        f"store        {gb(layout.state_bytes)} of state and {gb(layout.gradient_bytes)} of "
        f"spooled gradients in {len(layout.tiles)} tiles of {len(layout.records)} records",
        f"memory       {memory} = {gib(wanted.total_memory_bytes)}",
        *draw(middle_step(recipe, options, layout)),
    ]


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
