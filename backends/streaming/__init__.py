"""Weight streaming: trains models that do not fit the device's memory, or the machine's, with the results of ordinary
training.

A schedule of our own for any torch device (docs/weight-streaming.md); its speed says nothing about any vendor's system.
With a file tier the *store* is the run's state: after a crash the run continues from its last completed step;
checkpoints are exports.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weftrain.backends.common.base import PlainBackend, options_of
from weftrain.backends.common.device import prepare_process
from weftrain.backends.streaming.options import (
    StreamingOptions,
    buffer_bytes,
    check_changes,
    check_experts,
    has_replicas,
    layout_of,
    store_folder,
)
from weftrain.core.backend import Job, StoredState
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.order.batch import BatchSource
from weftrain.core.prediction import Prediction, Speeds

if TYPE_CHECKING:
    from weftrain.backends.streaming.engine import StreamingRun
    from weftrain.backends.streaming.placement import Placement
    from weftrain.backends.streaming.store.base import Store


class StreamingBackend(PlainBackend):
    name = "streaming"
    summary = "weight streaming: state in RAM or on disk, one layer at a time on the device; fp32 or bf16, exact"
    options = StreamingOptions
    returns_gradients = True
    unsupported = frozenset({"dropout", "muon"})
    portable_options = frozenset(
        {
            "compile",
            "activations",
            "offload_activations",
            "tier",  # not the store's path: it then lies in the folder that the job names
            "state_format",
            "layer_slots",
            "buffer_mib",
            "tile_elements",
        }
    )

    def prepare(self, job: Job) -> StreamingRun:
        """Raises BackendError: no such device, too little room, a store in use, damaged or of another recipe."""
        from weftrain.backends.streaming.communicator import Communicator
        from weftrain.backends.streaming.engine import StreamingRun
        from weftrain.backends.streaming.replicas.leader import ReplicaLeader
        from weftrain.backends.streaming.replicas.rendezvous import agreement

        options, device = options_of(job, StreamingOptions), _prepared_device(job)
        replicas = job.recipe.batch.replicas
        if replicas * job.recipe.batch.micro_batch_size > job.recipe.batch.global_batch_size:
            raise BackendError(
                f"batch.replicas is {replicas} and there are fewer micro-batches: each replica needs one of its own"
            )
        check_changes(job.recipe, options)
        check_experts(job.recipe, options)
        if job.recipe.objective.keeps_first_model and has_replicas(job.recipe, options):
            raise BackendError(
                f"objective {job.recipe.objective.name}: replicas do not have the model that the run began with: set "
                "batch.replicas=1 and backend.options.open_to_replicas=false"
            )
        store, placement, limit = _open_store(job.recipe, options, store_folder(options, job.folder), device)
        try:
            communicator = Communicator()
            if replicas > 1 or options.open_to_replicas:
                if job.folder is None:
                    raise BackendError(
                        "replicas find each other in the run's folder, and this run has none: set batch.replicas=1"
                    )
                sharded, timeout_s = options.sharded, options.timeout_s
                communicator = ReplicaLeader(job.folder, agreement(job), replicas, device, sharded, timeout_s, job.stop)
            return StreamingRun(job, options, device, store, communicator, placement, limit)
        except BaseException:
            store.close()
            raise

    def follows(self) -> bool:
        return False  # a replica is started by `weftrain replica`, never by a launcher

    def nothing_to_lead(self, job: Job) -> None:
        """See Follower.nothing_to_lead: leave a note for replicas, which wait for a run or will within their --wait."""
        from weftrain.backends.streaming.replicas.rendezvous import release_replicas

        if job.folder is not None and has_replicas(job.recipe, options_of(job, StreamingOptions)):
            release_replicas(job.folder)

    def run_worker(self, read: Callable[[], Job], open_source: Callable[[Job], BatchSource], wait_s: float) -> None:
        """Be a replica of a run until it ends, or until this process is asked to stop and rank 0 lets it leave.

        Raises BackendError if no run admits this process within wait_s, or if rank 0 fails.
        """
        from weftrain.backends.streaming.engine import StreamingRun
        from weftrain.backends.streaming.needs import place
        from weftrain.backends.streaming.replicas.worker import carry_out_commands, join_run
        from weftrain.backends.streaming.store.ram import EmptyStore

        if (joined := join_run(read, _prepared_device, wait_s)) is None:
            return
        job, worker = joined
        options = options_of(job, StreamingOptions)
        if worker.sharded:
            folder = store_folder(options, job.folder, f"store-{worker.rank}")
            store, placement, limit = _open_store(job.recipe, options, folder, worker.device, worker.rank)
        else:
            store, limit = EmptyStore(layout_of(job.recipe, options)), None
            placement = place(job.recipe, options, store.layout, worker.device.type, None)
        run = StreamingRun(job, options, worker.device, store, worker, placement, limit)
        try:
            carry_out_commands(run, worker, open_source(job))
        finally:
            run.close()

    def stored_state(self, recipe: Recipe, options: StrictModel, folder: Path) -> StoredState | None:
        """See Backend.stored_state: that of a file tier's store, if it has been trained since it was filled."""
        from weftrain.backends.common.step_result import result_from_json
        from weftrain.backends.streaming.store.file import holds_no_store, read_commit

        assert isinstance(options, StreamingOptions)
        where = store_folder(options, folder)
        if where is None or holds_no_store(layout_of(recipe, options), where):
            return None
        commit = read_commit(where)
        if commit is None or commit.step == commit.filled_step:
            return None
        return StoredState(commit.step, commit.stretch, where, commit.dataset_id, result_from_json(commit.result))

    def outline(self, recipe: Recipe, options: StrictModel) -> list[str]:
        """See Predictor.outline: the timeline of a step, with every byte that the store moves."""
        from weftrain.backends.streaming.planner import outline

        assert isinstance(options, StreamingOptions)
        return outline(recipe, options)

    def predict(self, recipe: Recipe, options: StrictModel, speeds: Speeds) -> Prediction:
        """See Predictor.predict: of a machine's memory and disk, so not for devices by name."""
        from weftrain.backends.streaming.planner import predict

        assert isinstance(options, StreamingOptions)
        return predict(recipe, options, speeds)


def _prepared_device(job: Job) -> torch.device:
    """The device that the options name; also sets this process's threads and allocator."""
    from weftrain.kernels.host_memory import return_freed_memory

    options, device = prepare_process(job, StreamingOptions)
    if not options.huge_pages:
        return_freed_memory()
    return device


def _open_store(
    recipe: Recipe, options: StreamingOptions, folder: Path | None, device: torch.device, rank: int = 0
) -> tuple[Store, Placement, int | None]:
    """The store, what stays on the device, and the bytes that the engine may allocate there (None: no limit)."""
    from weftrain.backends.streaming.needs import check_memory, device_memory, kept_device_bytes, place
    from weftrain.backends.streaming.store.direct import DirectStore
    from weftrain.backends.streaming.store.mapped import MappedStore
    from weftrain.backends.streaming.store.ram import RamStore

    layout = layout_of(recipe, options, rank)
    available = device_memory(options, device.type)
    placement = place(recipe, options, layout, device.type, available)
    check_memory(recipe, options, layout, placement, device.type, available)
    limit = None if available is None else kept_device_bytes(layout, placement)
    if options.tier == "ram":
        return RamStore(layout, pinned=device.type == "cuda"), placement, limit
    if folder is None:
        raise BackendError(
            f"backend.options.tier is {options.tier} and there is no folder for it: give backend.options.store a path"
        )
    if options.tier == "mapped":
        return MappedStore(layout, folder), placement, limit
    return DirectStore(layout, folder, buffer_bytes(layout, options)), placement, limit


BACKEND: Any = StreamingBackend()
