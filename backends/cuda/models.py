"""The model across ranks: one interface, `RankModel`, behind which stand sharded.py (FSDP2, HSDP, tensor, context and
expert parallel), replicated.py (DDP) and stage_replicas.py (a pipeline's stages with DDP), and how it is built.

Each holds the part of the fp32 master weights that this rank owns, by canonical name, and return gradients of the same
shapes, summed over all ranks. The engine never sees a DTensor: `whole` and `part` convert between a rank's plain tensor
and the whole one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weftrain.backends.common.decoder import (
    Kernels,
    compute_dtype,
    decoder_on_meta,
    is_frozen_copy,
)
from weftrain.backends.common.sums import TreeSum, gradient_sum
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.experts import split_experts
from weftrain.backends.cuda.float8 import use_float8
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.overlap import use_async_tensor_parallel
from weftrain.backends.cuda.parallel import Meshes, compile_blocks, split_sequences, split_tensors
from weftrain.backends.cuda.pipeline_layout import layers_of_stages, parameters_of_stage, stages_of_rank
from weftrain.backends.cuda.replicated import Replicated
from weftrain.backends.cuda.row_share import share_rows
from weftrain.backends.cuda.sharded import Sharded
from weftrain.backends.cuda.stage import Part, RankTokens, Stage, whole_part
from weftrain.backends.cuda.stage_replicas import ReplicatedStages
from weftrain.backends.cuda.tensor_parts import split_parts
from weftrain.core.blocks import Block
from weftrain.core.config import Recipe
from weftrain.core.model import Decoder
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import ParameterSpec


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
        """`row_squares` of what this rank owns of each parameter -> of the whole one. A collective."""
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
    if shape.sequence > 1 and (recipe.objective.measures or recipe.model.experts is not None):
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
    sums = gradient_sum(recipe, dist.get_rank(meshes.stage) // shape.row_ranks)
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
    if meshes.tensor is not None and shape.copies > 1:
        split_parts(blocks, meshes.tensor)
    elif meshes.tensor is not None:
        split_tensors(blocks, config, meshes, dtype)
    if meshes.experts is not None:
        split_experts(model, meshes.experts["expert"])


def freeze(model: nn.Module, specs: Sequence[ParameterSpec], compute: torch.dtype) -> None:
    """What is frozen takes no gradient, and FSDP holds it in the dtype that it computes in."""
    for spec in specs:
        parameter = model.get_parameter(spec.name).requires_grad_(spec.trained)
        if is_frozen_copy(spec, compute):
            owner, _, attribute = spec.name.rpartition(".")
            narrow = nn.Parameter(parameter.detach().to(compute), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, narrow)
