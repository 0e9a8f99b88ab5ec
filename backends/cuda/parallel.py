"""How a model is split across ranks: device meshes, and the arguments of torch's DTensor plans and fully_shard.

    ranks = replicate x shard x context x tensor, tensor fastest

A rank works on its own tokens everywhere but in a block's linear maps: context and tensor ranks share a row's sequence
between them, the data-parallel ranks (replicate x shard) the rows. So embedding, head and norms are data parallel over
*all* ranks, and only the linear maps of a block are split over `tensor`. Norms are
left out of fully_shard: they stay whole and fp32 on every rank, and their gradients (0.004 % of Amber's) are reduced
together (`Sharded.take_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from weftrain.backends.common.decoder import FP32_ROLES
from weftrain.backends.cuda.options import CudaOptions
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.model import Block, Decoder
from weftrain.core.parameters import parameter_specs


@dataclass(frozen=True)
class Degrees:
    """Number of parts in each dimension of parallelism."""

    replicate: int
    shard: int
    context: int
    tensor: int

    @property
    def size(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def data(self) -> int:
        """Ranks, or groups of ranks, with rows of their own."""
        return self.replicate * self.shard

    @property
    def sequence(self) -> int:
        """Parts that a row's tokens are cut into."""
        return self.context * self.tensor


def degrees(options: CudaOptions, recipe: Recipe, size: int, ranks_per_node: int) -> Degrees:
    """The degrees for `size` ranks. Raises BackendError, with the remedy, for numbers that do not divide."""
    model, tokens, batch = recipe.model, recipe.data.sequence_length, recipe.batch
    tensor, context = options.tensor_parallel, options.context_parallel
    if size % (tensor * context):
        raise BackendError(
            f"{size} ranks are no multiple of tensor_parallel x context_parallel = {tensor} x {context}: start a "
            "multiple of "
            f"{tensor * context} processes, or set backend.options.tensor_parallel and context_parallel"
        )
    data = size // (tensor * context)
    if recipe.precision.numerics == "replayable" and (options.parallel != "ddp" or size & (size - 1)):
        raise BackendError(
            f"precision.numerics is replayable with backend.options.parallel={options.parallel} and {size} ranks: the "
            "fixed tree needs "
            "parallel=ddp and 1, 2, 4, 8 .. ranks: set them, or numerics=fast"
        )
    if model.dropout and tensor * context > 1:
        raise BackendError(
            f"model.dropout is {model.dropout} and tensor or context parallel ranks have no dropout: set degrees of 1, "
            "or dropout=0"
        )
    if batch.replicas != data:
        of = f" of {tensor * context} ranks each" if tensor * context > 1 else ""
        raise BackendError(
            f"{size} ranks make {data} data-parallel replicas{of}, and batch.replicas is {batch.replicas}: set "
            f"batch.replicas={data}, or "
            f"start {batch.replicas * tensor * context} processes"
        )
    if tensor * context > 1 and (said := model.later_fields()):
        raise BackendError(
            f"tensor_parallel x context_parallel is {tensor * context} and does not split model.{said[0]}: "
            "set both to 1"
        )
    if model.num_heads % (tensor * context):
        raise BackendError(
            f"model.num_heads {model.num_heads} is no multiple of tensor_parallel x context_parallel = "
            f"{tensor * context}"
        )
    if model.intermediate_size % tensor or tokens % (tensor * context):
        what = (
            f"data.sequence_length {tokens} is no multiple of tensor_parallel x context_parallel = {tensor * context}"
        )
        if model.intermediate_size % tensor:
            what = f"model.intermediate_size {model.intermediate_size} is no multiple of tensor_parallel {tensor}"
        raise BackendError(f"{what}: choose other degrees")
    if options.parallel == "fsdp":
        return Degrees(1, data, context, tensor)
    if options.parallel == "ddp":
        return Degrees(data, 1, context, tensor)
    shard = options.shard_group or max(1, ranks_per_node // (tensor * context))
    if data % shard:
        raise BackendError(
            f"{data} data-parallel replicas are no multiple of shard_group {shard}: set backend.options.shard_group"
        )
    return Degrees(data // shard, shard, context, tensor)


@dataclass(frozen=True)
class Meshes:
    """The same ranks in three meshes, for blocks, for data-parallel modules and for context groups."""

    blocks: DeviceMesh  # replicate, shard (with context), tensor
    everywhere: DeviceMesh  # replicate, shard (with context and tensor)
    context: DeviceMesh | None
    tensor: DeviceMesh | None

    @staticmethod
    def of(degrees: Degrees, device_type: str) -> Meshes:
        blocks = init_device_mesh(
            device_type,
            (degrees.replicate, degrees.shard * degrees.context, degrees.tensor),
            mesh_dim_names=("replicate", "shard", "tensor"),
        )
        everywhere = blocks
        if degrees.tensor > 1:
            shape = (degrees.replicate, degrees.shard * degrees.context * degrees.tensor)
            everywhere = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
        context = None
        if degrees.context > 1:
            names = ("data", "context", "tensor")
            context = init_device_mesh(
                device_type, (degrees.data, degrees.context, degrees.tensor), mesh_dim_names=names
            )["context"]
        return Meshes(blocks, everywhere, context, blocks["tensor"] if degrees.tensor > 1 else None)


# Recomputation and compilation

# Matrix multiplies and attention: what selective checkpointing keeps. Attention kernels of the registry are custom ops
# of their own namespaces, and scaled_dot_product_attention is one of aten's.
_KEPT_ATEN = ("mm", "addmm", "bmm", "_scaled_dot_product", "scaled_dot_product")


def _keep_products(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    namespace, _, name = str(getattr(operator, "name", lambda: "")()).partition("::")
    kept = name.startswith(_KEPT_ATEN) if namespace == "aten" else "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _block_forward(block: Block, *arguments: Any) -> Tensor:
    return Block.forward(block, *arguments)


def _selective(block: Block, *arguments: Any) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, _keep_products)
    found: Tensor = checkpoint(
        _block_forward, block, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return found


def compile_blocks(model: Decoder, options: CudaOptions) -> None:
    """Give every block its forward: compiled (all blocks share one graph, since their parameters are its inputs),
    recomputing, or both.

    As an attribute of the block, so that names stay, and what fully_shard does before and after a block stays outside
    of both.
    """
    mode = "reduce-overhead" if options.cuda_graphs else None
    kind = options.activation_checkpointing
    run: Callable[..., Tensor] = _selective if kind == "selective" else _block_forward
    if options.compile:
        run = torch.compile(run, dynamic=False, mode=mode)
    if kind == "full":
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    if run is not _block_forward:
        for block in model.layers:
            block.forward = partial(run, block)  # type: ignore[method-assign]


# Tensor, sequence and context parallel


def split_tensors(model: Decoder, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Split a block's linear maps over `mesh`, and its tokens between them: a rank's stream is [B, T / tensor, C].

    Tokens are gathered before q, k, v and before gate, up, and given back after o and down, in the compute dtype.
    """
    plan = {
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "attention.q_proj": ColwiseParallel(),
        "attention.k_proj": ColwiseParallel(),
        "attention.v_proj": ColwiseParallel(),
        "attention.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "ffn": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "ffn.gate_proj": ColwiseParallel(),
        "ffn.up_proj": ColwiseParallel(),
        "ffn.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    for block in model.layers:
        block = cast(Block, block)
        parallelize_module(block, mesh, plan)
        for module in (block.attention, block.ffn):
            module.register_forward_pre_hook(partial(_in_compute_dtype, compute_dtype), prepend=True)


def _in_compute_dtype(dtype: torch.dtype, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0].to(dtype), *arguments[1:])


class HeadExchange:
    """Attention over tokens that lie on several ranks (Ulysses, arXiv 2309.14509): all of a row's tokens and some heads
    meet on a rank.

    [B, T / context, H, D] -> [B, T, H / context, D], any attention kernel, and back: an all-to-all each way.
    """

    def __init__(self, kernel: Callable[..., Tensor], mesh: DeviceMesh) -> None:
        self._kernel, self._mesh = kernel, mesh

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        together = self._exchange(torch.stack((q, k, v)), 2, 3)
        mixed = self._kernel(*(part.contiguous() for part in together.unbind()), **options)
        return self._exchange(mixed, 2, 1)

    def _exchange(self, x: Tensor, whole: int, cut: int) -> Tensor:
        found: Tensor = (
            DTensor.from_local(x, self._mesh, [Shard(whole)], run_check=False)
            .redistribute(placements=[Shard(cut)])
            .to_local()
        )
        return found.contiguous()


def split_sequences(model: Decoder, mesh: DeviceMesh) -> None:
    for block in model.layers:
        attention = cast(Block, block).attention
        attention.attention = HeadExchange(attention.attention, mesh)


def use_float8(model: Decoder) -> None:
    """The blocks' linear maps in float8, dynamic scaling. Raises BackendError if torchao cannot be used."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise BackendError(
            f"backend.options.float8 needs torchao ({error}): pip install 'weftrain[float8]', or set float8=false"
        ) from error

    def takes(module: nn.Module, name: str) -> bool:
        return (
            name.startswith("layers.")
            and isinstance(module, nn.Linear)
            and not any(size % 16 for size in module.weight.shape)
        )

    emulate = not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))
    if emulate and torch.cuda.is_available():
        raise BackendError(
            f"backend.options.float8 needs compute capability 8.9 and {torch.cuda.get_device_name()} has less: set "
            "float8=false"
        )
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=takes)


# Sharding


def shard(model: Decoder, meshes: Meshes, options: CudaOptions, compute_dtype: torch.dtype) -> None:
    """Apply FSDP2 (or HSDP) to each block, and to embedding and head as the root; norms stay whole."""
    whole = {spec.name for spec in parameter_specs(model.config) if spec.role in FP32_ROLES}
    norms = {parameter for name, parameter in model.named_parameters() if name in whole}
    policies: dict[str, Any] = {
        "ignored_params": norms,
        # Nothing is cast on its way in: the residual stream and the rotary tables are fp32, and the modules cast for
        # themselves.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=getattr(torch, options.reduce), cast_forward_inputs=False
        ),
    }
    if options.cpu_offload:
        policies["offload_policy"] = CPUOffloadPolicy(pin_memory=meshes.blocks.device_type == "cuda")
    of_blocks, of_all = (
        mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]
        for mesh in (meshes.blocks, meshes.everywhere)
    )
    for block in model.layers:
        fully_shard(block, mesh=of_blocks, reshard_after_forward=options.reshard_after_forward, **policies)
    fully_shard(model, mesh=of_all, **policies)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the tokens of the global batch, so gradients are added and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
