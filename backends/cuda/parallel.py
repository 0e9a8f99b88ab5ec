"""How a model is split across ranks: device meshes, and the arguments of torch's DTensor plans and fully_shard.

    ranks = pipeline x replicate x shard x context x tensor, tensor fastest

A rank works on its own tokens everywhere but in a block's linear maps (with precision.tensor_parts tensor ranks have
the same tokens, see tensor_parts.py): context and tensor ranks share a row's sequence between them, the data-parallel
ranks (replicate x shard) the rows. So embedding, head, norms and mixtures of experts are data parallel over *all* ranks
of a pipeline stage, and only the linear maps of attention and of dense feed-forwards are split over `tensor`. Norms and
routers are left out of fully_shard: they stay whole and fp32 on every rank, and their gradients (0.004 % of Amber's)
are reduced together (`Sharded.take_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from weftrain.backends.common.frozen_layers import FrozenLayers
from weftrain.backends.common.recompute import block_runner
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.experts import fsdp_dimension
from weftrain.backends.cuda.meshes import mesh_of, own_group
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.overlap import gather_ahead
from weftrain.core.blocks import Block, Norm
from weftrain.core.experts import MixtureOfExperts
from weftrain.core.model import Decoder
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import FP32_ROLES, parameter_specs

Layers = Decoder | FrozenLayers


@dataclass(frozen=True)
class Meshes:
    """The same ranks in several meshes, for blocks, for data-parallel modules and for groups that share tokens."""

    blocks: DeviceMesh  # replicate, shard (with context), tensor
    everywhere: DeviceMesh  # replicate, shard (with context and tensor, but for ranks that compute the same tokens)
    context: DeviceMesh | None
    tensor: DeviceMesh | None
    same_head: DeviceMesh | None  # of the tensor ranks: those that hold the same key and value head
    # replicate, shard (with context and tensor), expert: for experts that are divided between ranks
    experts: DeviceMesh | None
    timeout_s: float  # that a rank waits for another in any of their groups
    stage: dist.ProcessGroup | None  # the ranks of a pipeline stage; None: all ranks
    # of these the ones whose gradients are added: all, or one of each group that computes the same tokens
    adding: dist.ProcessGroup | None
    pipeline: dist.ProcessGroup | None  # the ranks with the same place in each stage; None: there is one stage

    @staticmethod
    def of(degrees: Degrees, kv_heads: int, device_type: str, timeout_s: float) -> Meshes:
        def mesh(names: str, *shape: int) -> DeviceMesh:
            return mesh_of(device_type, shape, tuple(names.split()), timeout_s, degrees.pipeline)

        shards = degrees.shard * degrees.context
        blocks = mesh("replicate shard tensor", degrees.replicate, shards, degrees.tensor)
        everywhere, context, same_head = blocks, None, None
        if degrees.tensor > 1 and degrees.copies == 1:
            everywhere = mesh("replicate shard", degrees.replicate, shards * degrees.tensor)
        if degrees.context > 1:
            context = mesh("data context tensor", degrees.data, degrees.context, degrees.tensor)["context"]
        if (alike := degrees.tensor // kv_heads) > 1:
            same_head = mesh("others same_head", degrees.stage_ranks // alike, alike)["same_head"]
        tensor, experts = blocks["tensor"] if degrees.tensor > 1 else None, None
        if degrees.expert > 1:
            copies_of_experts = shards * degrees.tensor // degrees.expert
            experts = mesh("replicate shard expert", degrees.replicate, copies_of_experts, degrees.expert)
        stage = pipeline = None
        if degrees.pipeline > 1:
            ranks = torch.arange(degrees.size).view(degrees.pipeline, degrees.stage_ranks)
            stage, pipeline = own_group(ranks, timeout_s), own_group(ranks.T, timeout_s)
        adding = stage
        if degrees.copies > 1:
            ranks = torch.arange(degrees.size).view(degrees.pipeline, -1, degrees.copies)
            adding = own_group(ranks.transpose(1, 2).flatten(0, 1), timeout_s)
        return Meshes(blocks, everywhere, context, tensor, same_head, experts, timeout_s, stage, adding, pipeline)


def blocks_of(model: Layers) -> list[Block]:
    return [cast(Block, block) for block in model.layers]


# Recomputation and compilation


def _block_forward(block: Block, *arguments: Any) -> Tensor:
    return Block.forward(block, *arguments)


def compile_blocks(blocks: Iterable[Block], options: CudaOptions) -> None:
    """Give every block its forward: compiled, recomputing, or both.

    As an attribute of the block, so that names stay, and what fully_shard does before and after a block stays outside
    of both.
    """
    mode = "reduce-overhead" if options.cuda_graphs else None
    run = block_runner(_block_forward, options.activation_checkpointing, options.compile, mode)
    if run is not _block_forward:
        for block in blocks:
            block.forward = partial(run, block)  # type: ignore[method-assign]


# Tensor, sequence and context parallel


def _gathered(arguments: int) -> PrepareModuleInput:
    """All tokens of the first of a module's positional arguments; the others are passed on."""
    others = (None,) * (arguments - 1)
    return PrepareModuleInput(input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others))


def split_tensors(blocks: Iterable[Block], config: ModelConfig, meshes: Meshes, compute_dtype: torch.dtype) -> None:
    """Split a block's linear maps over the tensor ranks, and its tokens between them: a rank's stream is
    [B, T / tensor, C].

    Tokens are gathered before q, k, v and before gate, up, and given back after o and down, in the compute dtype. A
    rank has the queries of some heads, and the keys and values that these read: where there are fewer of them than
    ranks, the ranks that share a head compute a part of it each and gather it. Experts are not split: they are given
    the rank's own tokens.
    """
    mesh = meshes.tensor
    assert mesh is not None
    of_attention: dict[str, Any] = {
        "attention": _gathered(arguments=5),
        "attention.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        **{f"attention.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
    }
    of_dense = {
        "ffn": _gathered(arguments=2),
        "ffn.down_proj": RowwiseParallel(output_layouts=Shard(1)),
        "ffn.up_proj": ColwiseParallel(),
        **({"ffn.gate_proj": ColwiseParallel()} if config.feed_forward == "swiglu" else {}),
    }
    for block in blocks:
        dense = not isinstance(block.ffn, MixtureOfExperts)
        parallelize_module(block, mesh, of_attention | of_dense if dense else of_attention)
        for module in (block.attention, block.ffn) if dense else (block.attention,):
            module.register_forward_pre_hook(partial(_in_compute_dtype, compute_dtype), prepend=True)
        if meshes.same_head is not None:
            for projection in (block.attention.k_proj, block.attention.v_proj):
                projection.register_forward_hook(partial(_gather_head, meshes.same_head))
        if config.qk_norm == "full":
            q_norm, k_norm = cast(Norm, block.attention.q_norm), cast(Norm, block.attention.k_norm)
            q_norm.function = SplitNorm(mesh, mesh.size())
            k_norm.function = SplitNorm(mesh, min(mesh.size(), config.num_kv_heads))


def _in_compute_dtype(dtype: torch.dtype, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0].to(dtype), *arguments[1:])


def _gather_head(mesh: DeviceMesh, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return gather_features(output, mesh)


def gather_features(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[..., n] on each rank -> [..., ranks x n] on all. A rank's gradient is the sum of those that all ranks have for
    its part, whichever of them use it.
    """
    spread = DTensor.from_local(x.contiguous(), mesh, [Shard(x.ndim - 1)], run_check=False)
    found: Tensor = spread.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return found


class SplitNorm:
    """RMSNorm or LayerNorm over features that lie on several ranks, in place of a norm's kernel: fp32, with the
    statistics of all features; weight and bias are the whole ones.

    parts: into which the features are cut; each is on equally many consecutive ranks, so that the mean over ranks is
    that over parts.
    """

    def __init__(self, mesh: DeviceMesh, parts: int) -> None:
        self._mesh, self._parts = mesh, parts

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Tensor:
        part = self._mesh.get_local_rank() * self._parts // self._mesh.size()
        x32 = x.float()
        if bias is not None:
            x32 = x32 - self._mean(x32)
        normed = weight.chunk(self._parts)[part].float() * (x32 * torch.rsqrt(self._mean(x32.square()) + eps))
        return (normed if bias is None else normed + bias.chunk(self._parts)[part].float()).to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        return gather_features(x.mean(-1, keepdim=True), self._mesh).mean(-1, keepdim=True)


class HeadExchange:
    """Attention over tokens that lie on several ranks (Ulysses, arXiv 2309.14509): all of a row's tokens and some heads
    meet on a rank.

    [B, T / context, H, D] -> [B, T, H / context, D], any attention kernel, and back: an all-to-all each way. A key and
    value head goes to every rank whose queries read it.
    """

    def __init__(self, kernel: Callable[..., Tensor], mesh: DeviceMesh) -> None:
        self._kernel, self._mesh = kernel, mesh

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        of_rank = [self._by_rank(x) for x in (q, k, v)]  # [B, T / context, context, heads, D]
        together = self._exchange(torch.cat(of_rank, 3).flatten(2, 3), 1, 2)
        parts = together.split([x.shape[3] for x in of_rank], 2)
        return self._exchange(self._kernel(*(part.contiguous() for part in parts), **options), 2, 1)

    def _by_rank(self, x: Tensor) -> Tensor:
        ranks = self._mesh.size()
        if (copies := ranks // x.shape[2]) > 1:
            x = x[:, :, :, None].expand(-1, -1, -1, copies, -1).flatten(2, 3)
        return x.unflatten(2, (ranks, -1))

    def _exchange(self, x: Tensor, cut: int, to_cut: int) -> Tensor:
        found: Tensor = (
            DTensor.from_local(x, self._mesh, [Shard(cut)], run_check=False)
            .redistribute(placements=[Shard(to_cut)])
            .to_local()
        )
        return found.contiguous()


def split_sequences(blocks: Iterable[Block], mesh: DeviceMesh) -> None:
    for block in blocks:
        attention = block.attention
        attention.attention = HeadExchange(attention.attention, mesh)


# Sharding


def _placement(parts: int, parameter: nn.Parameter) -> Shard | None:
    """How FSDP cuts a parameter into so many parts; None: by its first dimension."""
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return Shard(fsdp_dimension(here.shape, parts)) if here.ndim == 3 else None


def shard(
    model: nn.Module,
    blocks: Sequence[Block],
    config: ModelConfig,
    meshes: Meshes,
    options: CudaOptions,
    compute_dtype: torch.dtype,
    in_tree: bool = False,
) -> None:
    """Apply FSDP2 (or HSDP) to each block of a model, and to embedding and head as the root; norms stay whole.

    in_tree: FSDP is not told of the replicas, over which the caller adds the gradients.
    """
    whole = {spec.name for spec in parameter_specs(config) if spec.role in FP32_ROLES}
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

    def of_fsdp(mesh: DeviceMesh) -> DeviceMesh:
        return mesh["replicate", "shard"] if mesh["replicate"].size() > 1 and not in_tree else mesh["shard"]

    def shard_part(module: nn.Module, mesh: DeviceMesh) -> None:
        placed: dict[str, Any] = {"reshard_after_forward": options.reshard_after_forward}
        if config.experts is not None and not in_tree:  # a tree's rows are those of the first dimension
            placed["shard_placement_fn"] = partial(_placement, mesh["shard"].size())
        fully_shard(module, mesh=of_fsdp(mesh), **policies, **placed)

    for block in blocks:
        mixture = block.ffn if isinstance(block.ffn, MixtureOfExperts) else None
        # the ranks that add their gradients: all whose tokens they are given, and not one of the tensor ranks alone
        if mixture is not None and (meshes.experts is not None or meshes.tensor is not None):
            mixture.experts.own_dtype = compute_dtype  # they are gathered apart from the block, when they are called
            shard_part(mixture.experts, meshes.everywhere if meshes.experts is None else meshes.experts)
        if mixture is not None and mixture.shared is not None and meshes.tensor is not None:
            shard_part(mixture.shared, meshes.everywhere)
        shard_part(block, meshes.blocks)
    fully_shard(model, mesh=of_fsdp(meshes.everywhere), **policies)
    gather_ahead(blocks, options.gather_blocks_ahead)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the tokens of the global batch, so gradients are added and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
