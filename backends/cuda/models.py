"""The model across ranks, with one interface (`RankModel`) and two implementations: Sharded (FSDP2, HSDP, tensor and
context parallel) and Replicated (DDP).

Both hold the part of the fp32 master weights that this rank owns, by canonical name, and return gradients of the same
shapes, summed over all ranks. The engine never sees a DTensor: `whole` and `part` convert between a rank's plain tensor
and the whole one.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from weftrain.backends.common.decoder import (
    Kernels,
    at_rest,
    bind_parameters,
    compute_dtype,
    decoder_on_meta,
    is_frozen_copy,
)
from weftrain.backends.common.step import present
from weftrain.backends.common.sums import OrderedSum, TreeSum, gradient_sum, take_at_once
from weftrain.backends.cuda.experts import split_experts
from weftrain.backends.cuda.float8 import GatherBytes, forget_scale, prepare_scales, unwrapped, use_float8
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.overlap import use_async_tensor_parallel
from weftrain.backends.cuda.parallel import (
    Degrees,
    Layers,
    Meshes,
    compile_blocks,
    shard,
    split_sequences,
    split_tensors,
)
from weftrain.backends.cuda.pipeline_layout import layers_of_stages, parameters_of_stage, stages_of_rank
from weftrain.backends.cuda.row_share import share_rows
from weftrain.backends.cuda.stage import Part, RankTokens, Stage, whole_part
from weftrain.backends.cuda.stage_replicas import ReplicatedStages
from weftrain.backends.cuda.tree import TreeReduceScatter, gather_row_values, tree_all_reduce
from weftrain.core.blocks import Block
from weftrain.core.config import Recipe
from weftrain.core.model import Decoder
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import FP32_ROLES, ParameterSpec


class RankModel(Protocol):
    """What the engine asks of a model across ranks."""

    weights: dict[str, Tensor]  # fp32 masters, what this rank owns; some may be empty
    copies: dict[str, Tensor]  # compute copies of them that the update writes; empty where torch makes them itself

    def loss(self, tokens: RankTokens, dropout_keys: Tensor | None) -> Tensor:
        """What the head returns for this rank's tokens: of next_token the sum of the token losses, fp32, 0-dim."""
        ...

    def micro_batch(self, last: bool, part: int = 0) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; in a pipeline, around a backward of this rank's stage `part`.
        Gradients are reduced across ranks after the last one.
        """
        ...

    def take_gradients(self) -> dict[str, Tensor]:
        """Parameter -> the part of its summed gradient that this rank owns; the model keeps none. A collective."""
        ...

    def owners(self, name: str) -> int:
        """Ranks that own the same piece of a parameter."""
        ...

    def gather_rows(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One value for each row of a parameter that this rank owns -> for each of its rows. A collective."""
        ...

    def whole(self, name: str, owned: Tensor) -> Tensor:
        """A parameter (or a tensor of its shape) assembled from what all ranks own. A collective."""
        ...

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this rank owns of a whole tensor that every rank was given."""
        ...

    def place_weight(self, name: str, whole: Tensor) -> None:
        """Keep this rank's part of a whole fp32 weight that every rank was given. A frozen one that computes in bf16 is
        kept in bf16, and in fp32 in host memory besides where that would lose bits.
        """
        ...

    def updated(self) -> None:
        """To be called after the optimizer wrote weights and copies."""
        ...

    def refresh(self) -> None:
        """To be called after the weights were changed from outside."""
        ...


class Sharded:
    """FSDP2. Built on `meta`, so that no rank ever holds the whole model."""

    def __init__(
        self,
        model: Layers,
        parts: Sequence[Part],
        specs: Sequence[ParameterSpec],
        meshes: Meshes,
        options: CudaOptions,
        compute_dtype: torch.dtype,
        device: torch.device,
        tree: TreeSum | None = None,
    ) -> None:
        """parts: of the model, what this rank computes; specs: of their parameters. tree: adds gradients of this rank's
        micro-batches that are not cut across ranks; all sums over ranks are then in the same fixed tree (tree.py).
        None: FSDP adds them.
        """
        self._model, self._device, self._parts = model, device, parts
        for part in parts:
            shard(part.module, part.blocks, model.config, meshes, options, compute_dtype, in_tree=tree is not None)
            part.module.to_empty(device="cpu" if options.cpu_offload else device)
        model.place_rotary_tables(device)
        if options.cpu_offload:
            for module in self._modules():  # FSDP does not manage norms: they stay on the compute device
                for name, parameter in module.named_parameters(recurse=False):
                    if not isinstance(parameter, DTensor):
                        setattr(
                            module,
                            name,
                            nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad),
                        )
        self._gathers_float8 = options.float8_gather
        if self._gathers_float8:
            for part in parts:
                for sharded in _sharded_modules(part.module):
                    sharded.set_custom_all_gather(cast(Any, GatherBytes()))
        self._every_micro_batch = options.reduce_every_micro_batch
        self._settle()
        self._parameters = {spec.name: model.get_parameter(spec.name) for spec in specs}
        self._trained = {spec.name: self._parameters[spec.name] for spec in specs if spec.trained}
        self._norms = [spec.name for spec in specs if spec.role in FP32_ROLES and spec.trained]
        self.weights = {spec.name: unwrapped(self._parameters[spec.name]).detach() for spec in specs}
        self.copies: dict[str, Tensor] = {}
        self._stage = meshes.stage
        self._size = dist.get_world_size(meshes.stage)
        self._tree, self._shard_count = tree, meshes.blocks["shard"].size()
        self._shards, self._replicas = meshes.blocks["shard"].get_group(), meshes.blocks["replicate"].get_group()
        self._exchanges: list[list[TreeReduceScatter]] = [[] for _ in parts]  # of each part
        if tree is not None and self._shard_count > 1:
            of_group = tree.count // self._size, self._shard_count, meshes.blocks["shard"].get_local_rank()
            for part, exchanges in zip(parts, self._exchanges, strict=True):
                for sharded in _sharded_modules(part.module):
                    exchanges.append(TreeReduceScatter(*of_group))
                    sharded.set_custom_reduce_scatter(cast(Any, exchanges[-1]))

    def _modules(self) -> Iterator[nn.Module]:
        for part in self._parts:
            yield from part.module.modules()

    def _settle(self) -> None:
        """Let FSDP allocate its storage now, and not in the first forward, where padded parts would move."""
        for part in self._parts:
            for module in _sharded_modules(part.module):
                module.unshard()
                module.reshard()

    def loss(self, tokens: RankTokens, dropout_keys: Tensor | None) -> Tensor:
        loss: Tensor = self._model(*tokens, dropout_keys)
        return loss

    @contextlib.contextmanager
    def micro_batch(self, last: bool, part: int = 0) -> Iterator[None]:
        of_part = self._parts[part]
        if self._tree is None:
            cast(FSDPModule, of_part.module).set_requires_gradient_sync(last or self._every_micro_batch)
            yield
            return
        for exchange in self._exchanges[part]:
            exchange.last = last
        yield
        for name, parameter in self._trained.items():
            if name not in of_part.parameters:
                continue
            exchanged = isinstance(parameter, DTensor) and self._shard_count > 1
            if parameter.grad is not None and not exchanged:
                self._tree.add(name, unwrapped(parameter.grad))
            if not (exchanged and last):
                parameter.grad = None

    def _take_from_tree(self) -> dict[str, Tensor]:
        """As take_gradients, after the last micro-batch of a step."""
        assert self._tree is not None
        sums, each = self._tree.partial_sums(), self._tree.count // self._size
        self._tree.clear()
        norms = [present(block, self._norms) for block in sums]
        whole = sums[0] if self._shard_count == 1 else {}
        cut = {
            name: whole.get(name, None if parameter.grad is None else unwrapped(parameter.grad))
            for name, parameter in self._trained.items()
            if name not in self._norms
        }
        found = present(cut, cut)
        for parameter in self._trained.values():
            parameter.grad = None
        gradients = tree_all_reduce(norms, each, self._stage) if self._norms else {}
        for where in {gradient.device for gradient in found.values()}:  # of replicas, whose tree is one of pairs
            of_device = {name: gradient for name, gradient in found.items() if gradient.device == where}
            gradients |= tree_all_reduce([of_device], 1, self._replicas)
        return {name: gradients[name] for name in self._trained}

    def gather_rows(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        cut = {name: values.to(self._device) for name, values in own.items() if name not in self._norms}
        rows = {name: self._parameters[name].shape[0] for name in cut}
        return {**own, **gather_row_values(cut, rows, self._shards)}

    def take_gradients(self) -> dict[str, Tensor]:
        if self._tree is not None:
            return self._take_from_tree()
        found = {
            name: None if parameter.grad is None else unwrapped(parameter.grad)
            for name, parameter in self._trained.items()
        }
        gradients = present(found, self._trained)
        for parameter in self._trained.values():
            parameter.grad = None
        if self._size > 1 and self._norms:  # the norms', in one piece
            flat = torch.cat([gradients[name].reshape(-1) for name in self._norms])
            dist.all_reduce(flat, group=self._stage)
            pieces = flat.split([gradients[name].numel() for name in self._norms])
            gradients |= {name: piece.view_as(gradients[name]) for name, piece in zip(self._norms, pieces, strict=True)}
        return gradients

    def owners(self, name: str) -> int:
        parameter = self._parameters[name]
        if not isinstance(parameter, DTensor):
            return self._size
        mesh = parameter.device_mesh
        copies = math.prod(
            mesh.size(dim) for dim, placement in enumerate(parameter.placements) if isinstance(placement, Replicate)
        )
        return copies * self._size // mesh.size()

    def whole(self, name: str, owned: Tensor) -> Tensor:
        parameter = self._parameters[name]
        if not isinstance(parameter, DTensor):
            return owned
        owned = owned.to(self._device)
        spread = DTensor.from_local(
            owned,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return spread.full_tensor()

    def part(self, name: str, whole: Tensor) -> Tensor:
        parameter = self._parameters[name]
        if not isinstance(parameter, DTensor):
            return whole
        return distribute_tensor(
            whole.to(self._device), parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()

    def place_weight(self, name: str, whole: Tensor) -> None:
        local, part = unwrapped(self._parameters[name]).detach(), self.part(name, whole)
        if local.dtype != torch.float32:
            part = at_rest(part)
            self.weights[name] = part if part.dtype == torch.float32 else local
        local.copy_(part)
        if self._gathers_float8:
            forget_scale(self._parameters[name])

    def updated(self) -> None:
        """FSDP casts the weights whenever it gathers them, and takes the scales of those in float8 from here."""
        if self._gathers_float8:
            prepare_scales(self._model)

    def refresh(self) -> None:
        """After an evaluation the root module still holds gathered weights: free them."""
        for part in self._parts:
            for module in _sharded_modules(part.module):
                module.reshard()


class Replicated:
    """DDP: every rank holds the whole model, in masters and, in bf16, copies, as the local backend does."""

    def __init__(
        self,
        model: Decoder,
        specs: Sequence[ParameterSpec],
        options: CudaOptions,
        compute_dtype: torch.dtype,
        device: torch.device,
        sums: OrderedSum | TreeSum,
    ) -> None:
        """sums: adds the gradients of this rank's micro-batches. With a TreeSum the ranks' sums are added in the same
        tree (tree.py); otherwise the last micro-batch is added while DDP reduces it.
        """
        self._sums, self._in_tree = sums, isinstance(sums, TreeSum)
        self.weights = {spec.name: torch.empty(spec.shape, device=device) for spec in specs if spec.trained}

        self.weights |= {spec.name: torch.zeros(spec.shape) for spec in specs if not spec.trained}
        # padded products have other bits than those of a layout that does not pad
        self._bound = bind_parameters(model, specs, self.weights, compute_dtype, device, pads=not self._in_tree)
        self._parameters, self.copies = self._bound.parameters, self._bound.copies
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        self._compute_dtype, self._reduce_dtype = compute_dtype, getattr(torch, options.reduce)
        self._size = dist.get_world_size()
        self._reduced: dict[str, Tensor] = {}
        self._reduces = True  # DDP reduces the gradients of the micro-batch that runs; else they are added to the sums
        take_at_once(self._parameters, sums.add, lambda: not self._reduces)
        buffers = (
            "forward_sync_buffers"
            if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            else "broadcast_buffers"
        )
        self._ddp = DistributedDataParallel(
            model,
            init_sync=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=options.bucket_mib,
            **cast(Any, {buffers: False}),
        )
        # torch refuses annotations that are strings
        self._ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))

    def loss(self, tokens: RankTokens, dropout_keys: Tensor | None) -> Tensor:
        loss: Tensor = self._ddp(*tokens, dropout_keys)
        return loss

    @contextlib.contextmanager
    def micro_batch(self, last: bool, part: int = 0) -> Iterator[None]:
        self._reduces = last and not self._in_tree
        with contextlib.nullcontext() if self._reduces else self._ddp.no_sync():
            yield

    def _reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Sum a bucket over the ranks, with the earlier micro-batches' sums; fp32 parameters in fp32."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        names = [self._names[parameter] for parameter in parameters]
        sums = self._sums.totals()
        wanted = self._reduce_dtype if buffer.dtype == self._compute_dtype else torch.float32
        if not sums and buffer.dtype == wanted:
            if self._size == 1:
                return _done(buffer)
            return cast(
                "Future[Tensor]", dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])
            )
        flat = torch.cat(
            [
                (sums[name] + gradient if sums else gradient.float()).reshape(-1)
                for name, gradient in zip(names, bucket.gradients(), strict=True)
            ]
        )
        flat = flat.to(wanted) if self._size > 1 else flat

        def keep(_: Any) -> Tensor:
            for name, piece, gradient in zip(
                names,
                flat.split([gradient.numel() for gradient in bucket.gradients()]),
                bucket.gradients(),
                strict=True,
            ):
                self._reduced[name] = piece.view_as(gradient)
            return buffer

        if self._size == 1:
            keep(None)
            return _done(buffer)
        return cast("Future[Tensor]", dist.all_reduce(flat, async_op=True).get_future().then(keep))

    def take_gradients(self) -> dict[str, Tensor]:
        if isinstance(self._sums, TreeSum):
            blocks = [present(block, self._parameters) for block in self._sums.partial_sums()]
            gradients = tree_all_reduce(blocks, self._sums.count // self._size, None)
        else:
            found = {name: self._reduced.get(name, parameter.grad) for name, parameter in self._parameters.items()}
            gradients = present(found, self._parameters)
        self._sums.clear()
        self._reduced = {}
        for parameter in self._parameters.values():
            parameter.grad = None
        return {name: self._bound.own(name, gradient).contiguous() for name, gradient in gradients.items()}

    def owners(self, name: str) -> int:
        return self._size

    def gather_rows(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(own)

    def whole(self, name: str, owned: Tensor) -> Tensor:
        return owned

    def part(self, name: str, whole: Tensor) -> Tensor:
        return whole

    def place_weight(self, name: str, whole: Tensor) -> None:
        if name in self._bound.frozen:
            self._bound.place_frozen(name, whole)
        else:
            self.weights[name].copy_(whole)

    def updated(self) -> None:
        self._bound.refresh_columns()

    def refresh(self) -> None:
        self._bound.refresh()


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _done(tensor: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(tensor)
    return future


@dataclass(frozen=True)
class Built:
    """The decoder on this rank, of which only `specs` have memory; `stages` by their number, of a pipeline's rank."""

    decoder: Decoder
    model: RankModel
    specs: Sequence[ParameterSpec]
    stages: Mapping[int, Stage]


def build(
    recipe: Recipe, options: CudaOptions, kernels: Kernels, shape: Degrees, meshes: Meshes, device: torch.device
) -> Built:
    """The decoder, split and compiled, and this rank's part of it. A collective."""
    dtype, decoder = compute_dtype(recipe), decoder_on_meta(recipe, kernels)
    if shape.sequence > 1 and recipe.objective.measures:
        share_rows(decoder, shape, device.type, meshes.timeout_s)
    stages: dict[int, Stage] = {}
    specs, parts = recipe.parameters, [whole_part(decoder)]
    if meshes.pipeline is not None:
        layers = layers_of_stages(recipe, options)
        numbers = stages_of_rank(dist.get_rank(meshes.pipeline), options)
        stages = {number: Stage(decoder, layers[number]) for number in numbers}
        own = [frozenset(parameters_of_stage(number, recipe, options)) for number in numbers]
        parts = [Part(one, one.blocks, names) for one, names in zip(stages.values(), own, strict=True)]
        specs = tuple(spec for spec in specs if any(spec.name in names for names in own))
    blocks = [block for part in parts for block in part.blocks]
    if options.in_float8 is not None:
        use_float8(decoder, recipe.model, options.in_float8, shape.tensor)
    for part in parts:
        split(part.module, part.blocks, decoder.config, options, shape, meshes, dtype)
    use_async_tensor_parallel(options)
    compile_blocks(blocks, options)
    sums = gradient_sum(recipe, dist.get_rank(meshes.stage) // shape.sequence)
    model: RankModel
    if options.parallel == "ddp" and stages:
        model = ReplicatedStages(decoder, parts, specs, options, dtype, device, sums, meshes.stage)
    elif options.parallel == "ddp":
        model = Replicated(decoder, specs, options, dtype, device, sums)
    else:
        freeze(decoder, specs, dtype if options.in_float8 is None else torch.float32)
        tree = sums if isinstance(sums, TreeSum) else None
        model = Sharded(decoder, parts, specs, meshes, options, dtype, device, tree)
    return Built(decoder, model, specs, stages)


def split(
    model: nn.Module,
    blocks: Sequence[Block],
    config: ModelConfig,
    options: CudaOptions,
    shape: Degrees,
    meshes: Meshes,
    dtype: torch.dtype,
) -> None:
    """Split tokens and linear maps of the blocks across the ranks that share a row."""
    if meshes.context is not None:
        split_sequences(blocks, meshes.context)
    if meshes.tensor is not None:
        split_tensors(blocks, config, meshes, dtype)
    if meshes.experts is not None:
        split_experts(model, meshes.experts["expert"], dtype)


def freeze(model: nn.Module, specs: Sequence[ParameterSpec], compute: torch.dtype) -> None:
    """What is frozen takes no gradient, and FSDP holds it in the dtype that it computes in."""
    for spec in specs:
        parameter = model.get_parameter(spec.name).requires_grad_(spec.trained)
        if is_frozen_copy(spec, compute):
            owner, _, attribute = spec.name.rpartition(".")
            narrow = nn.Parameter(parameter.detach().to(compute), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, narrow)
