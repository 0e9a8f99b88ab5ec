"""backend.options of the cuda backend, and which of them contradict each other."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from weftrain.backends.common.device import DeviceOptions
from weftrain.core.config import CompileOption, RecomputeOption, TimeoutS
from weftrain.core.formats.strict_model import Count, PositiveInt


class CudaOptions(DeviceOptions, CompileOption, RecomputeOption):
    """backend.options of the cuda backend."""

    parallel: Literal["fsdp", "hsdp", "ddp"] = "fsdp"  # ddp: every rank holds the whole model
    shard_group: Count = 0  # hsdp: data-parallel ranks that share one sharded copy; 0: those of a node
    tensor_parallel: PositiveInt = 1  # ranks that share a block's linear maps, and the row's tokens between them
    context_parallel: PositiveInt = 1  # ranks that share a row's tokens
    # fsdp: free a block's gathered weights after forward, and gather them again for backward
    reshard_after_forward: bool = True
    reduce: Literal["float32", "bfloat16"] = "float32"  # dtype of gradients when they are reduced across ranks
    reduce_every_micro_batch: bool = False  # fsdp: least memory with accumulation, more communication
    cuda_graphs: bool = False  # compile's mode reduce-overhead; parallel=ddp alone, where weights stay where they are
    cpu_offload: bool = False  # fsdp: sharded weights and state in the host's memory
    float8: bool = False  # the blocks' linear maps through torchao
    timeout_s: TimeoutS = 600  # waiting for another rank
    stall_s: TimeoutS = 60  # after so long without progress the stalled rank is named, with its stack

    @model_validator(mode="after")
    def _check(self) -> CudaOptions:
        if self.parallel == "ddp":
            wrong = [name for name in ("tensor_parallel", "context_parallel") if getattr(self, name) > 1]
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
