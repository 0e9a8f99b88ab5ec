"""Weight streaming: trains what fits neither the device's memory nor the machine's, with exactly the numbers of
ordinary training.

A schedule of our own for any torch device (docs/weight-streaming.md); its speed says nothing about any vendor's system.
What a reader would get wrong: with a file tier the *store* is the run's state. It stands at the last completed step
whatever killed the process, and a run continues from it; checkpoints are exports.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from weftrain.backends.common.base import PlainBackend, ask_for_huge_pages, refuse_numerics, torch_device, use_threads
from weftrain.backends.streaming.planner import needs, predict, remedies
from weftrain.backends.streaming.schedule import Scheduler, draw
from weftrain.backends.streaming.store.layout import FormatName, Layout, make_layout
from weftrain.core.backend import BatchSource, Job, StoredState
from weftrain.core.config import CompileOption, Recipe, Threads, TimeoutS
from weftrain.core.errors import BackendError
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.formats.strict_model import Count, PositiveInt, StrictModel
from weftrain.core.prediction import Needs, Prediction, Speeds

if TYPE_CHECKING:
    import torch

    from weftrain.backends.streaming.engine import StreamingRun
    from weftrain.backends.streaming.store.base import Store


class StreamingOptions(CompileOption):
    """backend.options of the streaming backend."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Threads = 0  # CPU threads; 0: torch's own choice
    # on a CPU: activations in huge pages that the process keeps; false: smallest memory, slower; no bit changes
    huge_pages: bool = True
    # recompute: a block's input alone stays, the block runs again in backward
    activations: Literal["keep", "recompute"] = "keep"
    # activations=keep: what autograd saves goes to the host's memory (with a CUDA device)
    offload_activations: bool = False
    tier: Literal["ram", "mapped", "direct"] = "ram"  # where state lives: see store.py
    store: str | None = None  # folder of a file tier; null: `store` in the run's folder
    state_format: FormatName = "fp32"
    layer_slots: Annotated[int, Field(ge=2)] = 3  # tier direct: layers whose weights are in memory at once
    # tier direct: state on its way in and out, and as much of gradients; 0: what layer_slots layers have
    buffer_mib: Count = 0
    tile_elements: PositiveInt = 1 << 23  # parameters that are read and written at once
    memory_limit_mib: Count = 0  # refuse to start what would need more; 0: what the machine has available
    trace_steps: Count = 0  # first steps whose timeline goes to trace.json in the run's folder
    open_to_replicas: bool = False  # let replicas join while it trains, also where batch.replicas is 1
    # central: rank 0 owns the store; sharded: each rank owns a part of every tile
    fabric: Literal["central", "sharded"] = "central"
    timeout_s: TimeoutS = 600  # waiting for another rank
    poison_freed_slots: bool = False  # NaN where weights were that nobody may read any more: for tests and for doubts

    @model_validator(mode="after")
    def _check(self) -> StreamingOptions:
        if self.offload_activations and self.activations == "recompute":
            raise ValueError(
                "offload_activations needs activations=keep: recompute keeps nothing that could be offloaded"
            )
        return self


def layout_of(recipe: Recipe, options: StreamingOptions, shard: tuple[int, int] = (0, 1)) -> Layout:
    """The layout of the store that these options ask for."""
    split_above = options.tile_elements if options.tier == "direct" else None
    return make_layout(
        recipe, options.state_format, split_above=split_above, tile_elements=options.tile_elements, shard=shard
    )


def store_folder(options: StreamingOptions, folder: Path | None) -> Path | None:
    """Where a file tier keeps its state; None for tier ram, or where there is no folder to keep it in."""
    if options.tier == "ram":
        return None
    if options.store is not None:
        return Path(options.store)
    return None if folder is None else folder / "store"


def open_store(recipe: Recipe, options: StreamingOptions, shard: tuple[int, int], folder: Path | None) -> Store:
    """Raises BackendError: too little memory, no folder for a file tier, no room, a store of something else, in use, or
    torn.
    """
    from weftrain.backends.streaming.store.base import RamStore
    from weftrain.backends.streaming.store.direct import DirectStore
    from weftrain.backends.streaming.store.mapped import MappedStore

    layout = layout_of(recipe, options, shard)
    buffer_bytes = buffer_bytes_of(layout, options)
    check_memory(needs(recipe, layout, options, layer_slots(recipe, options), buffer_bytes), recipe, options)
    if options.tier == "ram":
        return RamStore(layout)
    if folder is None:
        raise BackendError(
            f"backend.options.tier is {options.tier} and there is no folder for it: give backend.options.store a path"
        )
    return MappedStore(layout, folder) if options.tier == "mapped" else DirectStore(layout, folder, buffer_bytes)


def _agreement(job: Job) -> str:
    """Hash of what all ranks must have in common; what else is in backend.options each may choose for its machine."""
    assert isinstance(job.options, StreamingOptions)
    layout = layout_of(job.recipe, job.options).identity
    return sha256_json(
        {
            "recipe": job.recipe.model_dump(mode="json", exclude={"backend"}),
            "layout": layout,
            "fabric": job.options.fabric,
        }
    )


def _set_up(job: Job) -> tuple[StreamingOptions, torch.device]:
    """Threads, the allocator and the device of this process."""
    from weftrain.kernels.host_memory import return_freed_memory

    options = job.options
    if not isinstance(options, StreamingOptions):
        raise BackendError(f"the streaming backend was given {type(options).__name__}; it takes StreamingOptions")
    device = torch_device(options.device)
    use_threads(job, options.threads)
    if not options.huge_pages:
        return_freed_memory()
    elif device.type == "cpu":
        ask_for_huge_pages()
    return options, device


def shares(recipe: Recipe, options: StreamingOptions) -> int:
    """Into how many parts the state is divided."""
    return recipe.batch.replicas if options.fabric == "sharded" else 1


def layer_slots(recipe: Recipe, options: StreamingOptions) -> int:
    """Places for layers on their way through, on a CPU; 0: weights are used where they lie."""
    moves = options.tier == "direct" or recipe.batch.replicas > 1 or options.open_to_replicas
    return min(options.layer_slots, recipe.model.num_layers) if moves else 0


class StreamingBackend(PlainBackend):
    name = "streaming"
    summary = "weight streaming: state in RAM or on disk, one layer at a time on the device; fp32 or bf16, exact"
    options = StreamingOptions
    returns_gradients = True
    portable_options = frozenset(
        {
            "compile",
            "activations",
            "offload_activations",
            "tier",  # not where: the store then lies in the folder that the job names
            "state_format",
            "layer_slots",
            "buffer_mib",
            "tile_elements",
        }
    )

    def prepare(self, job: Job) -> StreamingRun:
        """Raises BackendError for a device that is not there, a store that is in use, torn or of another recipe, or too
        little room.
        """
        from weftrain.backends.streaming.engine import StreamingRun
        from weftrain.backends.streaming.fabric import Alone, Leader

        refuse_numerics(job.recipe, self.name, "adds what its replicas send, in their order")
        options, device = _set_up(job)
        replicas = job.recipe.batch.replicas
        if replicas * job.recipe.batch.micro_batch_size > job.recipe.batch.global_batch_size:
            raise BackendError(
                f"batch.replicas is {replicas} and there are fewer micro-batches: each replica needs one of its own"
            )
        store = open_store(job.recipe, options, (0, shares(job.recipe, options)), store_folder(options, job.folder))
        try:
            fabric = Alone()
            if replicas > 1 or options.open_to_replicas:
                if job.folder is None:
                    raise BackendError("replicas meet in the run's folder, and this run has none: set batch.replicas=1")
                fabric = Leader(
                    job.folder,
                    _agreement(job),
                    replicas,
                    device,
                    options.fabric == "sharded",
                    options.timeout_s,
                    job.stop,
                )
            return StreamingRun(job, options, device, store, fabric)
        except BaseException:
            store.close()
            raise

    def follows(self) -> bool:
        return False  # a replica is started by `weftrain replica`, never by a launcher

    def nothing_to_lead(self, job: Job) -> None:
        pass

    def run_worker(self, read: Callable[[], Job], open_source: Callable[[Job], BatchSource], wait_s: float) -> None:
        """Be a replica of a run until it ends, or until this process is asked to stop and rank 0 lets go.

        read: the run's job, as its folder tells it now. Raises BackendError where no run lets this process in within
        wait_s, or where it is lost.
        """
        from weftrain.backends.streaming.engine import StreamingRun
        from weftrain.backends.streaming.fabric import Follower, join_run
        from weftrain.backends.streaming.store.base import EmptyStore

        def seat(job: Job, meeting: Path) -> Follower:
            options, device = _set_up(job)
            return Follower(meeting, device, options.fabric == "sharded", options.timeout_s)

        job, fabric = join_run(read, _agreement, seat, wait_s)
        options, device = _set_up(job)
        assert job.folder is not None
        if fabric.sharded:
            own = Path(options.store) if options.store is not None else job.folder / f"store-{fabric.rank}"
            store = open_store(job.recipe, options, (fabric.rank, fabric.size), own)
        else:
            store = EmptyStore(layout_of(job.recipe, options))
        run = StreamingRun(job, options, device, store, fabric)
        try:
            run.follow(open_source(job))
        finally:
            run.close()

    def stored_state(self, recipe: Recipe, options: StrictModel, folder: Path) -> StoredState | None:
        """See Backend.stored_state: the store of a file tier."""
        from weftrain.backends.streaming.store.mapped import kept_in

        assert isinstance(options, StreamingOptions)
        where = store_folder(options, folder)
        return None if where is None else kept_in(layout_of(recipe, options, (0, shares(recipe, options))), where)

    def outline(self, recipe: Recipe, options: StrictModel) -> list[str]:
        """See Predictor.outline: the timeline of a step, with every byte that the store moves."""
        assert isinstance(options, StreamingOptions)
        layout = layout_of(recipe, options, (0, shares(recipe, options)))
        ring, buffer_bytes = layer_slots(recipe, options), buffer_bytes_of(layout, options)
        wanted, form = needs(recipe, layout, options, ring, buffer_bytes), layout.format
        return [
            f"streaming    tier {options.tier}, activations {options.activations}; {form.name}: "
            f"{form.bytes_per_parameter(recipe.precision.compute):.4g} B a parameter; exact: {form.exact}",
            f"store        {layout.state_bytes / 1e9:,.2f} GB of state and {layout.gradient_bytes / 1e9:,.2f} GB of "
            "spooled gradients in "
            f"{len(layout.tiles)} tiles of {len(layout.records)} records",
            "memory       "
            + " + ".join(f"{name} {size / 2**20:,.0f}" for name, size in wanted.memory_bytes.items())
            + f" = {wanted.total_memory_bytes / 2**20:,.0f} MiB",
            *draw(Scheduler(layout, options.tier, ring, buffer_bytes).step(first_update=0)),
        ]

    def predict(self, recipe: Recipe, options: StrictModel, speeds: Speeds) -> Prediction:
        """See Predictor.predict: of a machine's memory and disk, so not for devices by name."""
        import dataclasses

        assert isinstance(options, StreamingOptions)
        if speeds.devices is not None:
            raise BackendError(
                "the streaming backend predicts for this machine, with its memory and disk: leave the devices out"
            )
        layout = layout_of(recipe, options, (0, shares(recipe, options)))
        found = predict(recipe, layout, options, layer_slots(recipe, options), buffer_bytes_of(layout, options), speeds)
        capacity = _available(options)[0] if speeds.capacity_bytes is None else speeds.capacity_bytes
        found = dataclasses.replace(found, capacity_bytes=capacity)
        return found if found.fits else dataclasses.replace(found, remedies=(remedies(recipe, options),))


def _available(options: StreamingOptions) -> tuple[int, str]:
    """Bytes of memory that a run may take, and who says so."""
    if options.memory_limit_mib:
        return options.memory_limit_mib << 20, "backend.options.memory_limit_mib allows"
    import psutil

    return psutil.virtual_memory().available, "are available"


def check_memory(wanted: Needs, recipe: Recipe, options: StreamingOptions) -> None:
    """Refuse before anything is started what does not fit. Raises BackendError, with what would make it fit."""
    available, whose = _available(options)
    if wanted.total_memory_bytes > available:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in wanted.memory_bytes.items())
        raise BackendError(
            f"the run needs about {wanted.total_memory_bytes / 2**20:,.0f} MiB of memory ({parts}), "
            f"{available / 2**20:,.0f} MiB {whose}: "
            f"{remedies(recipe, options)}"
        )


def buffer_bytes_of(layout: Layout, options: StreamingOptions) -> int:
    """Of state in flight: what the options say, or what `layer_slots` layers have, at least four tiles, at most 1
    GiB.
    """
    layers = [sum(tile.bytes + tile.gradient_bytes for tile in record.tiles) for record in layout.records[1:-1]]
    tile = max(tile.bytes + tile.gradient_bytes for tile in layout.tiles)
    return options.buffer_mib << 20 or max(4 * tile, min(options.layer_slots * max(layers), 1 << 30))


BACKEND: Any = StreamingBackend()
