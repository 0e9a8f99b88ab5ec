"""The options of the streaming backend, and what a recipe and they determine: the store's layout and folder, the number
of layer slots and the size of the I/O buffers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from weftrain.backends.common.device import DeviceOptions
from weftrain.backends.streaming.store.layout import Layout, make_layout
from weftrain.backends.streaming.store.state_format import FormatName
from weftrain.core.config import CompileOption, Recipe, TimeoutS
from weftrain.core.errors import BackendError
from weftrain.core.formats.strict_model import Count, PositiveInt


class StreamingOptions(DeviceOptions, CompileOption):
    # on a CPU: activations in huge pages that the process keeps; false: less memory, slower, bitwise identical results
    huge_pages: bool = True
    # recompute: only a block's input is kept, and the block runs again in backward
    activations: Literal["keep", "recompute"] = "keep"
    # with activations=keep on a CUDA device: what autograd saves is kept in host memory
    offload_activations: bool = False
    tier: Literal["ram", "mapped", "direct"] = "ram"  # where the state is kept: see store/base.py
    store: str | None = None  # folder of a file tier; null: `store` in the run's folder
    state_format: FormatName = "fp32"
    # tier direct, and with a device that has its own memory: layers whose weights are there at once
    layer_slots: Annotated[int, Field(ge=2)] = 3
    # tier direct: I/O buffers for state, and as much again for gradients; 0: enough for layer_slots layers
    buffer_mib: Count = 0
    tile_elements: PositiveInt = 1 << 23  # parameters that are read and written at once
    memory_limit_mib: Count = 0  # a run that would need more is refused; 0: the machine's available memory
    # device memory that the run may take; 0: what is free. On a CPU a number lets a part of its memory stand in for a
    # device of that size, to try out a placement and to count what would be copied
    device_memory_limit_mib: Count = 0
    layers_on_device: Count | None = None  # whose weights and optimizer state stay there; null: as many as fit
    # gradients of the other layers wait for their update in device memory; null: where they fit. Tier ram
    gradients_on_device: bool | None = None
    trace_steps: Count = 0  # first steps whose timeline goes to trace.json in the run's folder
    open_to_replicas: bool = False  # let replicas join while it trains, even if batch.replicas is 1
    # who owns the store. central: rank 0; sharded: each rank owns a part of every tile
    fabric: Literal["central", "sharded"] = "central"
    timeout_s: TimeoutS = 600  # how long to wait for another rank
    poison_freed_slots: bool = False  # for tests and debugging: fill each slot with NaN when its weights are freed

    @model_validator(mode="after")
    def _check(self) -> StreamingOptions:
        if self.offload_activations and self.activations == "recompute":
            raise ValueError(
                "offload_activations needs activations=keep: recompute keeps nothing that could be offloaded"
            )
        if self.gradients_on_device and self.tier != "ram":
            raise ValueError(
                "gradients_on_device needs tier=ram: with a file tier the store keeps every gradient until its update "
                "is written"
            )
        return self

    @property
    def sharded(self) -> bool:
        return self.fabric == "sharded"


def layout_of(recipe: Recipe, options: StreamingOptions, rank: int = 0) -> Layout:
    """The layout of the store that one rank keeps."""
    split_above = options.tile_elements if options.tier == "direct" else None
    shard = (rank, recipe.batch.replicas if options.sharded else 1)
    return make_layout(
        recipe, options.state_format, split_above=split_above, tile_elements=options.tile_elements, shard=shard
    )


def store_folder(options: StreamingOptions, folder: Path | None, name: str = "store") -> Path | None:
    """Where a file tier keeps its state. None for tier ram, or if the run has no folder."""
    if options.tier == "ram":
        return None
    if options.store is not None:
        return Path(options.store)
    return None if folder is None else folder / name


def has_replicas(recipe: Recipe, options: StreamingOptions) -> bool:
    """Whether weights can come from another rank."""
    return recipe.batch.replicas > 1 or options.open_to_replicas


def layer_slots(recipe: Recipe, options: StreamingOptions, apart: bool = False) -> int:
    """Slots that layers share; 0: weights are used in the store's own memory. apart: the device has its own memory."""
    copied = apart or options.tier == "direct" or has_replicas(recipe, options)
    return min(options.layer_slots, recipe.model.num_layers) if copied else 0


def buffer_bytes(layout: Layout, options: StreamingOptions) -> int:
    """I/O buffers for state: as the option says, or `layer_slots` layers (at least four tiles, at most 1 GiB)."""
    layers = [sum(tile.bytes + tile.gradient_bytes for tile in record.tiles) for record in layout.records[1:-1]]
    tile = max(tile.bytes + tile.gradient_bytes for tile in layout.tiles)
    return options.buffer_mib << 20 or max(4 * tile, min(options.layer_slots * max(layers), 1 << 30))


def check_experts(recipe: Recipe, options: StreamingOptions) -> None:
    """Raises BackendError for what a mixture of experts cannot have here."""
    if recipe.model.experts is None:
        return
    if has_replicas(recipe, options):
        raise BackendError(
            "model.experts: replicas do not count what routers do: set batch.replicas=1 and "
            "backend.options.open_to_replicas=false, or use cuda"
        )
    if options.compile:
        raise BackendError(
            "backend.options.compile is true and model.experts is given: experts, which are not compiled, were not "
            "tried between compiled parts in a store: set compile=false"
        )


def check_changes(recipe: Recipe, options: StreamingOptions) -> None:
    """Raises BackendError for a plan of changes that replicas, or a store on disk, would not go on through."""
    if not recipe.changes:
        return
    if has_replicas(recipe, options):
        raise BackendError(
            "changes: replicas leave a run where its recipe changes, and do not come back by themselves: set "
            "batch.replicas=1, or stop the run there and continue it with --allow"
        )
    made = layout_of(recipe, options).identity
    for first, _, stage in recipe.stages():
        later = StreamingOptions.model_validate(stage.backend.options)
        wanted = layout_of(stage, later).identity
        if other := [key for key in wanted if wanted[key] != made.get(key)] if options.tier != "ram" else []:
            raise BackendError(
                f"changes: at step {first} the store on disk would be another one ({', '.join(other)}): use tier ram, "
                "or let each batch have several micro-batches, or one, throughout the run"
            )
