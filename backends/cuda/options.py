"""backend.options of the cuda backend, and which of them contradict each other."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from weftrain.backends.common.device import DeviceOptions
from weftrain.core.config import CompileOption, RecomputeOption, TimeoutS
from weftrain.core.formats.strict_model import Count, PositiveInt


class CudaOptions(DeviceOptions, CompileOption, RecomputeOption):
    """backend.options of the cuda backend."""

    # fsdp: shard weights, gradients and optimizer state across all ranks; hsdp: shard within groups of ranks and
    # replicate the groups; ddp: every rank holds the whole model
    parallel: Literal["fsdp", "hsdp", "ddp"] = "fsdp"
    # hsdp: number of data-parallel ranks that share one sharded copy; 0: those of one node
    shard_group: Count = 0
    # number of ranks across which each block's linear maps, and a row's tokens between them, are split
    tensor_parallel: PositiveInt = 1
    context_parallel: PositiveInt = 1  # number of ranks across which each row's tokens are split
    # fsdp, hsdp: number of data-parallel ranks between which a layer's experts are divided; tokens go to their experts
    expert_parallel: PositiveInt = 1
    # fsdp, hsdp: free a block's gathered weights after forward and gather them again for backward: less memory, more
    # communication
    reshard_after_forward: bool = True
    reduce: Literal["float32", "bfloat16"] = "float32"  # dtype in which gradients are summed across ranks
    # fsdp, hsdp: reduce gradients after each micro-batch, not once a step: less memory, more communication
    reduce_every_micro_batch: bool = False
    # run each block as a CUDA graph (torch.compile's mode reduce-overhead); needs compile=true and parallel=ddp
    cuda_graphs: bool = False
    cpu_offload: bool = False  # fsdp, hsdp: keep sharded weights and optimizer state in host memory
    float8: bool = False  # compute the blocks' linear maps in float8, with torchao
    timeout_s: TimeoutS = 600  # seconds to wait for another rank before the run fails
    stall_s: TimeoutS = 60  # seconds without progress before the stalled rank is reported, with its stack
    # report: the run waits on, until timeout_s; replace: the rank is ended besides, and the launcher starts all again
    stalled: Literal["report", "replace"] = "report"
    # copy each rank's part of the state into the memory of its node and of the next one, every so many steps; 0: never
    memory_copies_every_steps: Count = 0
    memory_copies_folder: str = Field("/dev/shm", pattern="^/", max_length=1000)  # of a file system in memory

    @model_validator(mode="after")
    def _check(self) -> CudaOptions:
        if self.parallel == "ddp":
            wrong = [
                name for name in ("tensor_parallel", "context_parallel", "expert_parallel") if getattr(self, name) > 1
            ]
            wrong += [name for name in ("cpu_offload", "reduce_every_micro_batch") if getattr(self, name)]
            if wrong:
                raise ValueError(
                    f"{wrong[0]} needs parallel=fsdp or hsdp: with ddp every rank holds and computes the whole model"
                )
        if self.cuda_graphs and not (self.compile and self.parallel == "ddp"):
            raise ValueError(
                "cuda_graphs needs compile=true and parallel=ddp: fully_shard frees and allocates the weights that a "
                "graph holds"
            )
        if self.shard_group and self.parallel != "hsdp":
            raise ValueError("shard_group needs parallel=hsdp")
        return self
