"""The memory and disk that a run needs, what of its state stays on the device, and the refusal of a run that does not
fit. All of it follows from the layout; memory is an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import psutil

from weftrain.backends.common.device_memory import adapter_elements, frozen_sizes, most_sums, trains_head
from weftrain.backends.streaming.options import (
    StreamingOptions,
    buffer_bytes,
    has_replicas,
    layer_slots,
)
from weftrain.backends.streaming.placement import Placement, Slots, device_state_bytes
from weftrain.backends.streaming.store.layout import Layout, Record
from weftrain.backends.streaming.store.state_format import ITEM_BYTES
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.units import gib
from weftrain.core.model_config import ModelConfig
from weftrain.core.prediction import Needs

_BASE_BYTES = 400 << 20  # the interpreter, torch and generated code; importing torch alone takes 220 MiB
_CONTEXT_BYTES = 600 << 20  # of a CUDA context and its libraries' workspaces
_FRAGMENTS = 0.06
_LOGIT_CHUNK_BYTES = 6 << 24  # of a chunked head: 2^24 logits, in bf16 and in fp32


def needs(
    recipe: Recipe, options: StreamingOptions, layout: Layout, placement: Placement, device_type: str = "cpu"
) -> Needs:
    """Memory and disk of one process; the device's apart from the host's, if it has its own."""
    parts = {"program": _BASE_BYTES}
    work = _working_bytes(recipe, options, layout)
    slots = _slot_bytes(layout, placement)
    device: dict[str, int] = {}
    if placement.apart:
        if options.offload_activations:
            parts["activations"] = work.pop("activations")
        device = {"program": _CONTEXT_BYTES if device_type == "cuda" else 0, **work, "weights": slots}
        # of what torch allocates and frees: its blocks are rounded up, and do not always fit
        device["fragments"] = int(_FRAGMENTS * sum(work.values())) if device_type == "cuda" else 0
        device |= {"states kept": _state_bytes(layout, placement), "gradients kept": _waiting_bytes(layout, placement)}
        parts |= _copy_buffers(options, layout, placement)
    else:
        parts |= work
        if slots:
            parts["weights"] = slots
    if frozen := frozen_sizes(recipe):
        parts["frozen layers"] = sum(frozen)
    if options.tier == "direct":
        parts["buffers"] = 2 * buffer_bytes(layout, options)
    if options.tier == "ram":
        parts["store"] = sum(
            tile.bytes + (0 if tile.record in placement.gradients else tile.gradient_bytes)
            for tile in layout.tiles
            if tile.record not in placement.states
        )
    return Needs(parts, 0 if options.tier == "ram" else layout.file_bytes, device)


def _working_bytes(recipe: Recipe, options: StreamingOptions, layout: Layout) -> dict[str, int]:
    """What a pass computes with, on the device."""
    model, compute, recompute = recipe.model, recipe.precision.compute, options.activations == "recompute"
    item = ITEM_BYTES[compute]
    micro = recipe.batch.micro_batch_size * recipe.data.sequence_length
    tokens = recipe.batch.global_batch_size * recipe.data.sequence_length
    largest = max(record.trained_size for record in layout.records[1:-1])
    a_token = kept_by_a_block(model, recipe.data.sequence_length, item) + item * adapter_elements(recipe)
    block = micro * a_token
    count = recipe.batch.global_batch_size // recipe.batch.micro_batch_size
    accumulated = 4 if count > 1 else item
    vocabulary = model.vocab_size * model.hidden_size
    stream = tokens * model.hidden_size * 4
    frozen = frozen_sizes(recipe)
    return {
        **({"states of the frozen layers": stream + max(frozen)} if frozen else {}),
        "activations": stream * (model.num_layers + 2) if recompute else block * model.num_layers * tokens // micro,
        "one block at work": 2 * block,
        "gradients of a layer": 2 * largest * accumulated,
        "head": vocabulary * (4 + 2 * accumulated) * trains_head(recipe) + _LOGIT_CHUNK_BYTES,
        **_tree_bytes(recipe, max(largest, vocabulary), count, item),
    }


def _tree_bytes(recipe: Recipe, largest: int, count: int, item: int) -> dict[str, int]:
    """What `numerics: replayable` holds more than two sums of a record's gradients: the tree's other partial sums and,
    of a tied weight, the head's gradient of each micro-batch. largest: parameters of a record.
    """
    if recipe.precision.numerics != "replayable" or count == 1:
        return {}
    found = {"partial sums": 4 * largest * max(0, most_sums(count) - 1)}
    if recipe.model.tie_embeddings and trains_head(recipe):
        found["head's gradients"] = item * recipe.model.vocab_size * recipe.model.hidden_size * count
    return found


def _slot_bytes(layout: Layout, placement: Placement) -> int:
    """Of all slots through which records are streamed."""
    if not placement.layer_slots:
        return 0
    numbers, largest = Slots(layout, placement), dict[int, int]()
    for record in layout.records:
        if record.index not in placement.states:
            number = numbers.number(record)
            largest[number] = max(largest.get(number, 0), record.compute_bytes)
    return sum(largest.values())


def _state_bytes(layout: Layout, placement: Placement) -> int:
    return sum(device_state_bytes(record) for record in layout.records if record.index in placement.states)


def _waiting_bytes(layout: Layout, placement: Placement) -> int:
    return sum(tile.gradient_bytes for tile in layout.tiles if tile.record in placement.gradients)


def _copy_buffers(options: StreamingOptions, layout: Layout, placement: Placement) -> dict[str, int]:
    """Host memory through which copies go that do not come from the store's memory or end there."""
    waiting = [tile.gradient_bytes for tile in layout.tiles if tile.record in placement.gradients]
    size = max(waiting, default=0)
    if options.tier != "ram":
        size += 2 * max(sum(tile.gradient_bytes for tile in record.tiles) for record in layout.records)
    if options.tier == "direct":
        size += _slot_bytes(layout, placement)
    return {"buffers for copies": size}


def kept_device_bytes(layout: Layout, placement: Placement) -> int:
    """What the engine itself allocates in a device's memory."""
    return _slot_bytes(layout, placement) + _state_bytes(layout, placement) + _waiting_bytes(layout, placement)


def device_memory(options: StreamingOptions, device_type: str, capacity_bytes: float | None = None) -> int | None:
    """Bytes of the device's own memory that a run may take; None for a CPU, unless a limit makes a part of its memory
    stand in for a device. capacity_bytes: of a device that is not in this machine.
    """
    limit = options.device_memory_limit_mib << 20
    if device_type == "cpu":
        return limit or None
    if capacity_bytes is None:
        import torch

        capacity_bytes = torch.cuda.mem_get_info()[0]
    return min(limit or int(capacity_bytes), int(capacity_bytes))


def place(
    recipe: Recipe, options: StreamingOptions, layout: Layout, device_type: str, available: int | None
) -> Placement:
    """What stays in device memory, of which `available` bytes may be taken: as much state as fits, then gradients.

    Embedding and head first: without the embedding no layer can compute. Layers are spread evenly, so that copies and
    updates of the streamed ones run beside the computation of those that stay. Raises BackendError for options that ask
    for what cannot be kept.
    """
    apart = device_type != "cpu" or available is not None
    plain = Placement(layer_slots(recipe, options, apart), apart)
    asked = options.layers_on_device or options.gradients_on_device
    if not apart or has_replicas(recipe, options):
        if asked:
            raise BackendError(
                "layers_on_device and gradients_on_device are for one process on a device with its own memory: set "
                "backend.options.device=cuda, or on a CPU backend.options.device_memory_limit_mib, and batch.replicas=1"
            )
        return plain
    if available is None or (options.layers_on_device == 0 and not options.gradients_on_device):
        return plain
    embedding, *layers, head = layout.records
    wanted = options.layers_on_device
    if wanted is not None and wanted > len(layers):
        raise BackendError(f"backend.options.layers_on_device is {wanted}, and the model has {len(layers)} layers")

    def room(placement: Placement) -> int:
        return available - needs(recipe, options, layout, placement, device_type).total_device_bytes

    found = plain
    for outer in (embedding, head) if wanted != 0 else ():
        more = replace(found, states=found.states | {outer.index})
        found = more if room(more) >= 0 else found
    outer_states = found.states
    for count in range(1, (len(layers) if wanted is None else wanted) + 1):
        spread = {
            layers[n].index for n in range(len(layers)) if (n + 1) * count // len(layers) > n * count // len(layers)
        }
        more = replace(found, states=outer_states | spread)
        if wanted is None and room(more) < 0:
            break
        found = more
    for record in (
        reversed(layout.records) if options.tier == "ram" and options.gradients_on_device is not False else ()
    ):
        if record.index not in found.states:
            more = replace(found, gradients=found.gradients | {record.index})
            found = more if options.gradients_on_device or room(more) >= 0 else found
    return found


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


def _spread(layers: Sequence[Record], count: int) -> set[int]:
    """The indices of `count` layers, evenly among all."""
    total = len(layers)
    return {record.index for n, record in enumerate(layers) if (n + 1) * count // total > n * count // total}


def check_memory(
    recipe: Recipe,
    options: StreamingOptions,
    layout: Layout,
    placement: Placement,
    device_type: str,
    available_on_device: int | None,
) -> None:
    """Raises BackendError for a run that does not fit this machine's memory or the device's, with remedies."""
    wanted = needs(recipe, options, layout, placement, device_type)
    available, limited_by = available_memory(options)
    if wanted.total_memory_bytes > available:
        raise BackendError(
            f"the run needs about {gib(wanted.total_memory_bytes)} of memory "
            f"({', '.join(memory_parts(wanted.memory_bytes))}), "
            f"{gib(available)} {limited_by}: {remedies(recipe, options)}"
        )
    if available_on_device is not None and wanted.total_device_bytes > available_on_device:
        raise BackendError(
            f"the run needs about {gib(wanted.total_device_bytes)} of device memory "
            f"({', '.join(memory_parts(wanted.device_bytes))}), {gib(available_on_device)} are there: "
            f"{remedies(recipe, options, on_device=True)}"
        )


def available_memory(options: StreamingOptions) -> tuple[int, str]:
    """Bytes of memory that a run may take, and for a message what limits them."""
    if options.memory_limit_mib:
        return options.memory_limit_mib << 20, "backend.options.memory_limit_mib allows"
    return psutil.virtual_memory().available, "are available"


def remedies(recipe: Recipe, options: StreamingOptions, on_device: bool = False) -> str:
    """What would make a run fit, the cheapest first. on_device: it is the device's memory that it does not fit."""
    choices = {
        "backend.options.layers_on_device unset or smaller": on_device and bool(options.layers_on_device),
        "backend.options.gradients_on_device=false": on_device and bool(options.gradients_on_device),
        "backend.options.state_format=bf16_moments (moments are rounded)": (
            not on_device and options.tier == "ram" and options.state_format in ("fp32", "split")
        ),
        "backend.options.tier=direct (state on disk)": options.tier == "ram" and not on_device,
        "backend.options.activations=recompute (a third more arithmetic)": options.activations == "keep",
        "backend.options.layer_slots=2": options.layer_slots > 2,
        "a smaller backend.options.tile_elements": options.tier == "direct" and not options.buffer_mib,
        "batch.micro_batch_size=1": recipe.batch.micro_batch_size > 1,
        "precision.compute=bfloat16": recipe.precision.compute == "float32",
    }
    found = [remedy for remedy, helps in choices.items() if helps]
    return ", ".join(found) or "a smaller model, or a machine with more memory"


def device_type_of(options: StreamingOptions) -> str:
    if options.device != "auto":
        return options.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_parts(sizes: Mapping[str, int]) -> list[str]:
    return [f"{name} {gib(size)}" for name, size in sizes.items()]
