"""What a run will need and how long a step will take, before anything is started.

What a reader would get wrong: needs are computed and hold; times are a *prediction* from speeds that were measured (or
named), and say so. Which of them is the limit is the part to trust: a step is as long as the slowest of what runs at
once, and the first record's way in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weftrain.backends.streaming.schedule import Scheduler
from weftrain.backends.streaming.store.layout import ITEM_BYTES, Layout
from weftrain.core.config import Recipe
from weftrain.core.parameters import flops_per_token
from weftrain.core.prediction import Needs, Prediction, Speeds

if TYPE_CHECKING:
    from weftrain.backends.streaming import StreamingOptions

_BASE_BYTES = 400 << 20  # the interpreter, torch and generated code; importing torch alone takes 220 MiB
_LOGIT_CHUNK_BYTES = 6 << 24  # of a chunked head: 2^24 logits, in bf16 and in fp32
# Model FLOP/s over the measured peak, in the steps of bench_70m on two cores: 0.79 in bf16, 0.74 in fp32.
_EFFICIENCY = 0.75


def needs(recipe: Recipe, layout: Layout, options: StreamingOptions, ring: int, buffer_bytes: int) -> Needs:
    """Memory and disk of one process. ring: layers whose weights have places of their own."""
    model, compute, recompute = recipe.model, recipe.precision.compute, options.activations == "recompute"
    item, ram = ITEM_BYTES[compute], options.tier == "ram"
    micro = recipe.batch.micro_batch_size * recipe.data.sequence_length
    tokens = recipe.batch.global_batch_size * recipe.data.sequence_length
    layers = layout.records[1:-1]
    largest = max(record.size for record in layers)
    stream = tokens * model.hidden_size * 4
    block = micro * _block_bytes_a_token(recipe, item)
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
    if ring:
        parts["weights"] = ring * max(record.compute_bytes for record in layers) + layout.records[0].compute_bytes
        parts["weights"] += 0 if head is layout.records[0] else head.compute_bytes
    if options.tier == "direct":
        parts["buffers"] = 2 * buffer_bytes
    if ram:
        parts["store"] = sum(tile.bytes + tile.gradient_bytes for tile in layout.tiles)
    return Needs(parts, 0 if ram else layout.file_bytes)


def _block_bytes_a_token(recipe: Recipe, item: int) -> int:
    """What autograd keeps of a block, a token: the stream twice and the norms' results, q k v before and after
    rotation, and the FFN.
    """
    hidden, inner = recipe.model.hidden_size, recipe.model.intermediate_size
    return 2 * 4 * hidden + 2 * 4 * hidden + 7 * item * hidden + 3 * item * inner


def predict(
    recipe: Recipe, layout: Layout, options: StreamingOptions, ring: int, buffer_bytes: int, speeds: Speeds
) -> Prediction:
    """A step in the middle of a run: with the update of the one before."""
    schedule = Scheduler(layout, options.tier, ring, buffer_bytes).step(first_update=0)
    flops = flops_per_token(recipe.model, recipe.data.sequence_length) * recipe.tokens_per_step
    again = 4 / 3 if options.activations == "recompute" else 1.0
    size = sum(record.size for record in layout.records)
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
    return Prediction(
        max(slowest.values()) + times.get("first record", 0.0),
        limit,
        times,
        needs(recipe, layout, options, ring, buffer_bytes),
    )


def remedies(recipe: Recipe, options: StreamingOptions) -> str:
    """What would make it fit, in the order of what it costs."""
    found = []
    if options.tier == "ram":
        found.append("backend.options.tier=direct (state on disk)")
    if options.activations == "keep":
        found.append("backend.options.activations=recompute (a third more arithmetic)")
    if options.layer_slots > 2:
        found.append("backend.options.layer_slots=2")
    if options.tier == "direct" and not options.buffer_mib:
        found.append("a smaller backend.options.tile_elements")
    if recipe.batch.micro_batch_size > 1:
        found.append("batch.micro_batch_size=1")
    if recipe.precision.compute == "float32":
        found.append("precision.compute=bfloat16")
    return ", ".join(found) or "a smaller model, or a machine with more memory"
