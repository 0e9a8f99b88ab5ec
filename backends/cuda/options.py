"""backend.options of the cuda backend, and which of them contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from weftrain.backends.common.device import DeviceOptions
from weftrain.core.config import CompileOption, RecomputeOption, TimeoutS
from weftrain.core.formats.strict_model import Count, PositiveInt

Scaling = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8", "mxfp8_with_gw_hp"]


@dataclass(frozen=True)
class Float8:
    """Linear maps in eight bits. Scales are dynamic: torchao dropped delayed ones in its version 0.10."""

    scaling: Scaling
    linears: tuple[str, ...]  # patterns
    gather: bool

    @property
    def block_scaled(self) -> bool:
        return self.scaling.startswith("mxfp8")


def _scaling_of_bool(value: Any) -> Any:
    """`true` and `false` stand for the default way of scaling and for none."""
    return {True: "tensorwise", False: "none"}[value] if isinstance(value, bool) else value


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
    # fsdp, hsdp: number of ranks, with rows or parts of rows of their own, between which a layer's experts are divided;
    # tokens go to their experts
    expert_parallel: PositiveInt = 1
    # number of groups of ranks across which the layers are cut; the micro-batches of a step pass through them in turn
    pipeline_parallel: PositiveInt = 1
    # order of the micro-batches' passes; interleaved ones give each rank several stages, zero-bubble ones compute the
    # gradients of weights while a rank would wait, and need parallel=ddp
    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = "1f1b"
    pipeline_virtual_stages: PositiveInt = 1  # stages that each rank has, apart from one another; zbv: 2
    # number of layers of each stage, in order; none: as alike as the head, which counts with the last, allows
    pipeline_layers: list[PositiveInt] | None = None
    # fsdp, hsdp: free a block's gathered weights after forward and gather them again for backward: less memory, more
    # communication
    reshard_after_forward: bool = True
    # fsdp, hsdp: blocks whose weights are gathered while one computes; each after the first takes a block of memory
    gather_blocks_ahead: PositiveInt = 1
    bucket_mib: PositiveInt = 25  # ddp: MiB of gradients that are reduced at once, while others are computed
    # cut products into parts that are multiplied while the tensor ranks still send others; needs tensor_parallel and
    # compile=true
    async_tensor_parallel: bool = False
    reduce: Literal["float32", "bfloat16"] = "float32"  # dtype in which gradients are summed across ranks
    # fsdp, hsdp: reduce gradients after each micro-batch, not once a step: less memory, more communication
    reduce_every_micro_batch: bool = False
    # run each block as a CUDA graph (torch.compile's mode reduce-overhead); needs compile=true and parallel=ddp
    cuda_graphs: bool = False
    cpu_offload: bool = False  # fsdp, hsdp: keep sharded weights and optimizer state in host memory
    # compute linear maps of the blocks in eight bits, with torchao. tensorwise (or true): one scale a tensor; rowwise:
    # one a row or column of each product; mxfp8: one a block of 32 numbers. with_gw_hp: the gradients of weights are
    # products in the compute dtype
    float8: Annotated[Literal["none", Scaling], BeforeValidator(_scaling_of_bool)] = "none"
    # the linear modules, as patterns like those of tuning.lora.targets with blanks between them
    float8_linears: str = Field("layers.*", pattern=r"\S", max_length=4096)
    float8_gather: bool = False  # fsdp, hsdp: gather weights that are already in float8: half the bytes of bf16
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
            wrong += [
                name for name in ("cpu_offload", "reduce_every_micro_batch", "float8_gather") if getattr(self, name)
            ]
            if wrong:
                raise ValueError(
                    f"{wrong[0]} needs parallel=fsdp or hsdp: with ddp every rank holds and computes the whole model"
                )
        if self.cuda_graphs and not (self.compile and self.parallel == "ddp"):
            raise ValueError(
                "cuda_graphs needs compile=true and parallel=ddp: fully_shard frees and allocates the weights that a "
                "graph holds"
            )
        if self.float8_gather and self.float8 != "tensorwise":
            raise ValueError(
                f"float8_gather needs float8=tensorwise, not {self.float8}: a rank that holds a part of a tensor knows "
                "the scale of the whole, and not those of its columns"
            )
        if self.float8_gather and self.cpu_offload:
            raise ValueError(
                "float8_gather and cpu_offload: weights in the host's memory are not rounded there: set one"
            )
        if self.gather_blocks_ahead > 1 and self.parallel == "ddp":
            raise ValueError("gather_blocks_ahead needs parallel=fsdp or hsdp: with ddp no weights are gathered")
        if self.bucket_mib != 25 and (self.parallel != "ddp" or self.pipeline_parallel > 1):
            raise ValueError(
                "bucket_mib needs parallel=ddp without a pipeline: FSDP reduces a block at once, a pipeline's "
                "stage all of its gradients: leave it out"
            )
        if self.async_tensor_parallel and not (self.tensor_parallel > 1 and self.compile):
            raise ValueError(
                "async_tensor_parallel needs tensor_parallel above 1 and compile=true: the compiler cuts the products"
            )
        if self.shard_group and self.parallel != "hsdp":
            raise ValueError("shard_group needs parallel=hsdp")
        if (contradiction := self._pipeline_contradiction()) is not None:
            raise ValueError(contradiction)
        return self

    @property
    def in_float8(self) -> Float8 | None:
        if self.float8 == "none":
            return None
        return Float8(self.float8, tuple(self.float8_linears.split()), self.float8_gather)

    @property
    def zero_bubble(self) -> bool:
        """Whether the schedule computes the gradients of inputs and of weights apart."""
        return self.pipeline_schedule in ("interleaved_zero_bubble", "zbv")

    def _pipeline_contradiction(self) -> str | None:
        """What is wrong with the pipeline's options among themselves, with the remedy."""
        ranks, schedule, each = self.pipeline_parallel, self.pipeline_schedule, self.pipeline_virtual_stages
        if ranks == 1:
            if schedule != "1f1b" or each > 1 or self.pipeline_layers is not None:
                return (
                    "pipeline_schedule, pipeline_virtual_stages and pipeline_layers need pipeline_parallel above 1: "
                    "set it to the number of stages, or leave these out"
                )
            return None
        if schedule in ("1f1b", "gpipe") and each > 1:
            return (
                f"pipeline_virtual_stages is {each}, and pipeline_schedule {schedule} has one stage a rank: set "
                "pipeline_virtual_stages=1, or pipeline_schedule=interleaved_1f1b"
            )
        if schedule == "zbv" and each != 2:
            return f"pipeline_virtual_stages is {each}, and pipeline_schedule zbv has 2 a rank: set it to 2"
        if self.pipeline_layers is not None and len(self.pipeline_layers) != ranks * each:
            return (
                f"pipeline_layers has {len(self.pipeline_layers)} numbers for {ranks} ranks with {each} stages each: "
                f"give {ranks * each}, or leave it out"
            )
        if self.zero_bubble and self.parallel != "ddp":
            return (
                f"pipeline_schedule {schedule} needs parallel=ddp: it takes gradients around the hooks by which FSDP "
                "reduces them; set parallel=ddp, or pipeline_schedule=interleaved_1f1b"
            )
        if self.zero_bubble and (self.compile or self.activation_checkpointing != "none" or self.float8 != "none"):
            return (
                f"pipeline_schedule {schedule} goes through a block's graph twice, which compile, "
                "activation_checkpointing and float8 do not allow: leave them at false and none, or set "
                "pipeline_schedule=interleaved_1f1b"
            )
        if self.cuda_graphs:
            return (
                "cuda_graphs and pipeline_parallel: a graph's next replay overwrites what the micro-batches under way "
                "still need: set cuda_graphs=false, or pipeline_parallel=1"
            )
        if self.memory_copies_every_steps:
            return (
                "memory_copies_every_steps and pipeline_parallel: the copies know no stages: set "
                "memory_copies_every_steps=0, or pipeline_parallel=1"
            )
        return None
