"""A model across ranks that hold parts of it: FSDP2, HSDP, tensor, context and expert parallel (`RankModel`)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from weftrain.backends.common.decoder import (
    at_rest,
)
from weftrain.backends.common.step import present
from weftrain.backends.common.sums import TreeSum
from weftrain.backends.cuda.float8 import GatherBytes, forget_scale, prepare_scales, unwrapped
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.parallel import Layers, Meshes, shard
from weftrain.backends.cuda.stage import Part, RankTokens
from weftrain.backends.cuda.tree import TreeReduceScatter, gather_cut, gather_row_values, tree_all_reduce
from weftrain.core.parameters import FP32_ROLES, ParameterSpec


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
        self._stage, self._adding = meshes.stage, meshes.adding
        self._size = dist.get_world_size(meshes.stage)
        self._tree, self._shard_count = tree, meshes.blocks["shard"].size()
        self._tensor = None if meshes.tensor is None else meshes.tensor.get_group()
        self._shards, self._replicas = meshes.blocks["shard"].get_group(), meshes.blocks["replicate"].get_group()
        self._exchanges: list[list[TreeReduceScatter]] = [[] for _ in parts]  # of each part
        if tree is not None and self._shard_count > 1:
            of_group = (
                tree.count // dist.get_world_size(self._adding),
                self._shard_count,
                meshes.blocks["shard"].get_local_rank(),
            )
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
        sums, each = self._tree.partial_sums(), self._tree.count // dist.get_world_size(self._adding)
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
        gradients = tree_all_reduce(norms, each, self._adding) if self._norms else {}
        # of replicas, whose tree is one of pairs; in the order of the parameters, which all ranks have alike
        for where in dict.fromkeys(gradient.device for gradient in found.values()):
            of_device = {name: gradient for name, gradient in found.items() if gradient.device == where}
            gradients |= tree_all_reduce([of_device], 1, self._replicas)
        return {name: gradients[name] for name in self._trained}

    def gather_rows(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        cut = {name: values.to(self._device) for name, values in own.items() if name not in self._norms}
        if self._tensor is None:
            rows = {name: self._parameters[name].shape[0] for name in cut}
            return {**own, **gather_row_values(cut, rows, self._shards)}
        dimensions = {name: dimension for name in cut if (dimension := self._tensor_dimension(name)) is not None}
        ranks = dist.get_world_size(self._tensor)
        rows = {name: self._parameters[name].shape[0] // (ranks if dimensions.get(name) == 0 else 1) for name in cut}
        found = gather_row_values(cut, rows, self._shards)
        divided = {name: found[name] for name in dimensions}
        return {**own, **found, **gather_cut(divided, dimensions, self._tensor)}

    def _tensor_dimension(self, name: str) -> int | None:
        """In which a parameter is cut over the tensor ranks; None: they have the same of it."""
        parameter = self._parameters[name]
        if not isinstance(parameter, DTensor) or "tensor" not in (parameter.device_mesh.mesh_dim_names or ()):
            return None
        placement = parameter.placements[-1]  # the tensor ranks are the last dimension of a mesh
        return placement.dim if isinstance(placement, Shard) else None

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


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
