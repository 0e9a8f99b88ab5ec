"""Many processes, one model: torch.distributed with FSDP2, HSDP or DDP, tensor and context parallel; NCCL on GPUs, gloo
on CPUs.

    torchrun --standalone --nproc-per-node 2 -m weftrain.cli train RECIPE --backend cuda batch.replicas=2

torchrun starts the ranks, and fully_shard and DTensor plans shard the model across them (parallel.py). This package has
the step, the commands by which rank 0 leads the others, and the messages when a rank fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftrain.backends.common.base import PlainBackend
from weftrain.backends.common.device import prepare_process, torch_device
from weftrain.backends.cuda.options import CudaOptions
from weftrain.core.backend import Job, Plan, StoredState
from weftrain.core.config import Recipe
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.formats.units import gb, gib
from weftrain.core.order.batch import BatchSource
from weftrain.core.prediction import Prediction, Speeds
from weftrain.core.stop import StopRequest

if TYPE_CHECKING:
    from weftrain.backends.cuda.engine import CudaRun


_OF_THE_MACHINE = {"device", "threads", "huge_pages", "timeout_s", "stall_s", "stalled"} | {
    "memory_copies_every_steps",
    "memory_copies_folder",
}
OLDEST_TORCH = (2, 7)  # FSDP2 that leaves the norms whole, DDP that sends nothing when it is built


class CudaBackend(PlainBackend):
    name = "cuda"
    summary = (
        "many processes by torchrun: FSDP2, HSDP, DDP, tensor, context and expert parallel; NCCL on GPUs, gloo on "
        "CPUs; fp32 or bf16"
    )
    options = CudaOptions
    returns_gradients = True
    portable_options = frozenset(CudaOptions.model_fields) - _OF_THE_MACHINE

    def unavailable(self) -> str | None:
        import torch
        import torch.distributed as dist

        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
            return f"needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is {torch.__version__}: install one"
        return None if dist.is_available() else "this torch was built without torch.distributed: install another build"

    def outline(self, recipe: Recipe, options: StrictModel) -> list[str]:
        """See Predictor.outline: the degrees of parallelism, and what a device holds and sends."""
        from weftrain.backends.cuda.degrees import shared_heads
        from weftrain.backends.cuda.needs import needs
        from weftrain.backends.cuda.planner import degrees_of, pipeline_notes, traffic

        assert isinstance(options, CudaOptions)
        shape = degrees_of(recipe, options)
        held, sent = needs(recipe, options, shape, "cuda"), traffic(recipe, options, shape)
        return [
            f"ranks        {f'{shape.pipeline} pipeline x ' if shape.pipeline > 1 else ''}"
            f"{shape.replicate} replicate x {shape.shard} shard x {shape.context} context x "
            f"{shape.tensor} tensor "
            f"= {shape.size}" + (f", of which {shape.expert} share a layer's experts" if shape.expert > 1 else ""),
            *(f"{name}  {words}" for name, words in pipeline_notes(recipe, options, shape, "cuda").items()),
            *([f"heads        {told}"] if (told := shared_heads(recipe.model, shape)) else []),
            "memory       "
            + " + ".join(f"{name} {gib(size)}" for name, size in held.memory_bytes.items())
            + f" = {gib(held.total_memory_bytes)} a device",
            "sent         "
            + (" + ".join(f"{name} {gb(size)}" for name, size in sent.items()) or "0")
            + f" = {gb(sum(sent.values()))} a device and step",
        ]

    def predict(self, recipe: Recipe, options: StrictModel, speeds: Speeds) -> Prediction:
        """See Predictor.predict. Raises BackendError for numbers that do not divide."""
        from dataclasses import replace

        from weftrain.backends.common.device_memory import largest_micro_batch
        from weftrain.backends.cuda.needs import needs
        from weftrain.backends.cuda.planner import available, degrees_of, predict, remedies

        assert isinstance(options, CudaOptions)
        shape, capacity, device_type = degrees_of(recipe, options, speeds), speeds.capacity_bytes, "cuda"
        if capacity is None and speeds.devices is None:
            device = torch_device(options.device)
            (capacity, _), device_type = available(device, shape.size), device.type
        found = replace(predict(recipe, options, shape, speeds, device_type), capacity_bytes=capacity)
        if speeds.capacity_bytes is not None:

            def needed(changed: Recipe) -> int:
                return needs(changed, options, shape, device_type).total_memory_bytes

            most = largest_micro_batch(recipe, needed, speeds.capacity_bytes)
            if shape.pipeline > 1:  # whose ranks need a micro-batch each
                most = min(most, recipe.batch.global_batch_size // (recipe.batch.replicas * shape.pipeline))
            found = replace(found, largest_micro_batch=most)
        if capacity is not None and found.fits is False:
            found = replace(found, remedies=remedies(recipe, options, shape, device_type, capacity))
        return found

    def follows(self) -> bool:
        from weftrain.backends.cuda.rendezvous import launched

        return launched() and os.environ["RANK"] != "0"

    def prepare(self, job: Job) -> CudaRun:
        """Raises BackendError, on every rank: ranks that do not meet, differ, or do not fit the recipe."""
        from weftrain.backends.cuda.engine import CudaRun
        from weftrain.backends.cuda.rendezvous import rendezvous

        options, _ = prepare_process(job, CudaOptions)
        world = rendezvous(options.device, options.timeout_s, job.stop)
        plan = {name: getattr(job.plan, name) for name in ("start_step", "last_step")}
        given, found = job.weights is not None, world.copies
        recalled = found is not None and job.stored_state == "continue" and found.claims.step == job.plan.start_step
        given_first = given or job.first_weights is not None
        asked = {"weights": given, "recalled": recalled, "first_weights": given_first}
        asked["time_phases"] = job.time_phases
        world.command(do="prepare", recipe=job.recipe.model_dump(mode="json"), plan=plan, **asked)
        return CudaRun(job, options, world, given, recalled, given_first)

    def stored_state(self, recipe: Recipe, options: StrictModel, folder: Path) -> StoredState | None:
        """See Backend.stored_state: the newest complete one in the memory of the ranks' nodes, which meet for it."""
        from weftrain.backends.common.step_result import result_from_json
        from weftrain.backends.cuda.degrees import degrees, ranks_per_node
        from weftrain.backends.cuda.memory_copies import find, layout_of, run_folder, tell
        from weftrain.backends.cuda.rendezvous import launched, rendezvous
        from weftrain.core.run.ledger_schema import LEDGER

        assert isinstance(options, CudaOptions)
        if not (options.memory_copies_every_steps and launched() and (folder / LEDGER).exists()):
            return None
        prepare_process(Job(recipe, Plan(0, recipe.schedule.steps), options), CudaOptions)
        with StopRequest() as stop:  # ends the wait for the others, and nothing else: the caller has its own
            world = rendezvous(options.device, options.timeout_s, stop)
        if stop.number:
            os.kill(os.getpid(), stop.number)
        shape = degrees(options, recipe, world.size, ranks_per_node(world.size))
        layout, where = layout_of(recipe.model, shape, options.parallel), run_folder(options, folder)
        world.command(do="find", folder=str(where), layout=layout)
        world.copies, lines = find(world, where, layout)
        tell(lines)
        if world.copies is None:
            return None
        one = world.copies.claims
        result = result_from_json(one.result)
        return StoredState(one.step, one.segment, where, one.dataset_id, result, volatile=True)

    def nothing_to_lead(self, job: Job) -> None:
        """See Follower.nothing_to_lead: meet the ranks that wait; they end with this process."""
        from weftrain.backends.cuda.rendezvous import launched, rendezvous

        if launched():
            options, _ = prepare_process(job, CudaOptions)
            rendezvous(options.device, options.timeout_s, job.stop)

    def run_worker(self, read: Callable[[], Job], open_source: Callable[[Job], BatchSource], wait_s: float) -> None:
        """See Follower.run_worker. Ranks above 0 leave when rank 0 ends its process."""
        from weftrain.backends.cuda.rendezvous import rendezvous
        from weftrain.backends.cuda.worker import RankWorker

        job = read()
        options, _ = prepare_process(job, CudaOptions)
        RankWorker(rendezvous(options.device, options.timeout_s, job.stop), job, open_source).run()


BACKEND: Any = CudaBackend()
