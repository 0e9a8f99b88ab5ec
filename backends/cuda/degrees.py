"""How many parts a model and its tokens are cut into in each dimension of parallelism, what a layout cannot have, and
what of it a fingerprint records. Nothing of this needs a process group: the planner and the simulator read it too.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from weftrain.backends.common.sums import parts_words
from weftrain.backends.cuda.experts import check_division, check_experts
from weftrain.backends.cuda.float8 import check_float8
from weftrain.backends.cuda.options import CudaOptions, Float8
from weftrain.backends.cuda.pipeline_layout import check_pipeline, pipeline_numerics
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.model_config import ModelConfig


@dataclass(frozen=True)
class Degrees:
    """Number of parts in each dimension of parallelism."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1  # of the ranks that share one copy: those that hold other experts
    pipeline: int = 1
    copies: int = 1  # of the ranks of a row's tokens: those that compute the same ones; a group of consecutive ranks

    @property
    def size(self) -> int:
        return self.pipeline * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold the same layers."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def data(self) -> int:
        """Ranks, or groups of ranks, with rows of their own."""
        return self.replicate * self.shard

    @property
    def row_ranks(self) -> int:
        """Ranks of a stage that are given the same rows."""
        return self.context * self.tensor

    @property
    def sequence(self) -> int:
        """Parts that a row's tokens are cut into."""
        return self.row_ranks // self.copies


def ranks_per_node(size: int) -> int:
    """As the launcher says; all of `size` ranks if nothing does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size))


def numerics(options: CudaOptions, recipe: Recipe, shape: Degrees, device: torch.device) -> dict[str, Any]:
    """What can change a bit of the results, besides libraries and devices, as a fingerprint records it."""
    return {
        "parallel": options.parallel,
        "degrees": {
            "replicate": shape.replicate,
            "shard": shape.shard,
            "context": shape.context,
            "tensor": shape.tensor,
            "expert": shape.expert,
            **({"pipeline": shape.pipeline} if shape.pipeline > 1 else {}),
        },
        **(pipeline_numerics(options) if shape.pipeline > 1 else {}),
        "collectives": "gloo" if device.type == "cpu" else "nccl " + ".".join(map(str, torch.cuda.nccl.version())),
        "compute": recipe.precision.compute,
        "compile": options.compile,
        "cuda_graphs": options.cuda_graphs,
        **({"async_tensor_parallel": True} if options.async_tensor_parallel else {}),
        "float8": _float8_words(options.in_float8),
        "activation_checkpointing": options.activation_checkpointing,
        "micro_batch_size": recipe.batch.micro_batch_size,
        "reduce_every_micro_batch": options.reduce_every_micro_batch,
        "reduction": "micro-batches of all ranks added in a fixed tree, fp32" + parts_words(recipe)
        if recipe.precision.numerics == "replayable"
        else f"micro-batches added in order, ranks by the collective library, {options.reduce}",
    }


def _float8_words(float8: Float8 | None) -> bool | dict[str, Any]:
    """False, true for the defaults, or what is set: records of runs from before there were choices hold a bool."""
    if float8 is None or float8 == CudaOptions.model_validate({"float8": True}).in_float8:
        return float8 is not None
    return asdict(float8)


def degrees(options: CudaOptions, recipe: Recipe, size: int, ranks_per_node: int) -> Degrees:
    """The degrees for `size` ranks. Raises BackendError, with the remedy, for numbers that do not divide."""
    model, batch = recipe.model, recipe.batch
    tensor, context, pipeline = options.tensor_parallel, options.context_parallel, options.pipeline_parallel
    replica = tensor * context * pipeline
    if size % replica:
        names = "tensor_parallel x context_parallel" + " x pipeline_parallel" * (pipeline > 1)
        numbers = f"{tensor} x {context}" + f" x {pipeline}" * (pipeline > 1)
        raise BackendError(
            f"{size} ranks are no multiple of {names} = {numbers}: start a multiple of "
            f"{replica} processes, or set backend.options.{names.replace(' x ', ', ')}"
        )
    data = size // replica
    check_experts(options, recipe)
    if recipe.precision.numerics == "replayable":
        _check_replayable(options, recipe.precision.tensor_parts)
    if recipe.tuning.lora is not None and (tensor > 1 or options.in_float8 is not None):
        what = "backend.options.float8" if options.in_float8 is not None else "backend.options.tensor_parallel"
        raise BackendError(f"tuning.lora: adapters are not split or in float8: leave {what} at its default")
    if options.in_float8 is not None:
        check_float8(model, options.in_float8, tensor, batch.micro_batch_size * recipe.data.sequence_length // context)
    whole_tokens = recipe.precision.tensor_parts > 1  # on each tensor rank
    if recipe.drops and tensor * context > 1 and not whole_tokens:
        drops = f"model.dropout is {model.dropout}" if model.dropout else "tuning.lora.dropout is above 0"
        raise BackendError(
            f"{drops} and tensor or context parallel ranks have no dropout: set degrees of 1, or dropout=0"
        )
    if batch.replicas != data:
        of = f" of {replica} ranks each" if replica > 1 else ""
        raise BackendError(
            f"{size} ranks make {data} data-parallel replicas{of}, and batch.replicas is {batch.replicas}: set "
            f"batch.replicas={data}, or "
            f"start {batch.replicas * replica} processes"
        )
    if not whole_tokens:
        _check_split(model, recipe.data.sequence_length, tensor, context)
    if pipeline > 1:
        check_pipeline(options, recipe)
    others = {"pipeline": pipeline, "copies": tensor if whole_tokens else 1}
    if options.parallel == "fsdp":
        return _with_experts(options, model, Degrees(1, data, context, tensor, **others))
    if options.parallel == "ddp":
        return Degrees(data, 1, context, tensor, **others)
    # without shard_group those of a node, which may have the ranks of several stages
    shard = options.shard_group or max(1, min(data, ranks_per_node // (tensor * context)))
    if data % shard:
        raise BackendError(
            f"{data} data-parallel replicas are no multiple of shard_group {shard}: set backend.options.shard_group"
        )
    groups = data // shard
    if recipe.precision.numerics == "replayable" and groups & (groups - 1):
        raise BackendError(
            f"precision.numerics is replayable, and {data} ranks in shard groups of {shard} are {groups} groups: the "
            "fixed tree adds those in pairs, 1, 2, 4, 8 .. of them: set backend.options.shard_group, or parallel=fsdp"
        )
    return _with_experts(options, model, Degrees(data // shard, shard, context, tensor, **others))


def _with_experts(options: CudaOptions, model: ModelConfig, shape: Degrees) -> Degrees:
    check_division(options, model, shape.shard * shape.sequence)
    return replace(shape, expert=options.expert_parallel)


def _check_replayable(options: CudaOptions, parts: int) -> None:
    """Raises BackendError for what would make bits depend on the number of ranks or the layout."""
    what = None
    for name in ("context_parallel", "expert_parallel"):
        if (degree := getattr(options, name)) > 1:
            what = (
                f"backend.options.{name} is {degree}: a product or a sum over tokens that is cut into {degree} parts "
                f"is added in another order than a whole one: set {name}=1"
            )
    if (tensor := options.tensor_parallel) > 1 and parts == 1:
        what = (
            f"backend.options.tensor_parallel is {tensor}: a product that is cut into {tensor} parts is added in "
            f"another order than a whole one: set precision.tensor_parts={tensor}, with which every layout computes "
            "the same parts, or tensor_parallel=1"
        )
    elif parts > 1 and options.in_float8 is not None:
        what = (
            f"precision.tensor_parts is {parts} with backend.options.float8: a scale is of a whole tensor: set "
            "float8=none"
        )
    elif parts % tensor:
        what = (
            f"precision.tensor_parts {parts} is no multiple of backend.options.tensor_parallel {tensor}: each tensor "
            f"rank computes equally many parts: set tensor_parallel to 1, 2, 4 .. up to {parts}"
        )
    if options.reduce != "float32":
        what = f"backend.options.reduce is {options.reduce}: the tree adds in fp32: set reduce=float32"
    elif options.reduce_every_micro_batch:
        what = (
            "backend.options.reduce_every_micro_batch is true: the tree adds the micro-batches of a rank before those "
            "of others: set it to false"
        )
    elif options.parallel != "ddp" and not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        what = (
            f"torch {torch.__version__} lets nobody replace FSDP's reduce-scatter: set backend.options.parallel=ddp, "
            "install a newer torch"
        )
    if what is not None:
        raise BackendError(f"precision.numerics is replayable, and {what}, or set precision.numerics=fast")


def _check_split(model: ModelConfig, tokens: int, tensor: int, context: int) -> None:
    """Raises BackendError, with the field, for a model or rows that so many ranks cannot share."""
    both, kv_heads = tensor * context, model.num_kv_heads
    what = None
    if model.num_heads % both:
        what = f"model.num_heads {model.num_heads} is no multiple of tensor_parallel x context_parallel = {both}"
    elif not (_shared_evenly(kv_heads, tensor) and _shared_evenly(max(1, kv_heads // tensor), context)):
        what = (
            f"model.num_kv_heads {kv_heads} does not go into tensor_parallel {tensor} and then context_parallel "
            f"{context}: ranks hold equally many key and value heads, or groups of equally many ranks share one"
        )
    elif model.head_dim % max(1, tensor // kv_heads):
        what = (
            f"model.head_dim {model.head_dim} is no multiple of the {tensor // kv_heads} tensor-parallel ranks that "
            f"share one of model.num_kv_heads {kv_heads} and compute a part of it each"
        )
    elif _has_dense_layers(model) and model.intermediate_size % tensor:
        what = f"model.intermediate_size {model.intermediate_size} is no multiple of tensor_parallel {tensor}"
    elif tokens % both:
        what = f"data.sequence_length {tokens} is no multiple of tensor_parallel x context_parallel = {both}"
    if what is not None:
        raise BackendError(f"{what}: choose other degrees")


def _has_dense_layers(model: ModelConfig) -> bool:
    return model.experts is None or model.experts.dense_layers > 0


def _shared_evenly(heads: int, ranks: int) -> bool:
    return heads % ranks == 0 or ranks % heads == 0


def shared_heads(model: ModelConfig, shape: Degrees) -> str | None:
    """What a user is told at the start where several ranks of a sequence hold the same key and value head."""
    if shape.sequence <= model.num_kv_heads:
        return None
    return (
        f"model.num_kv_heads {model.num_kv_heads} on {shape.sequence} tensor and context parallel ranks: each key and "
        f"value head is on {shape.sequence // model.num_kv_heads} of them, and its gradients are summed over these"
    )
