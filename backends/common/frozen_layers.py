"""The first layers of the model that a run began with, kept beside those that are trained, for an objective that reads
their state (`keeps_first_model`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from weftrain.backends.common.decoder import (
    Kernels,
    bind_parameters,
    compute_dtype,
    decoder_on_meta,
    first_weight,
    is_frozen_copy,
)
from weftrain.backends.common.step import Rows
from weftrain.core.backend import Job
from weftrain.core.config import Recipe
from weftrain.core.parameters import ParameterSpec
from weftrain.core.rotary import Rotary


class FrozenLayers(nn.Module):
    """Embedding and blocks up to the boundary `objective.ends_at`, without memory until their parameters are bound.
    Parameters have their canonical names.
    """

    def __init__(self, recipe: Recipe, kernels: Kernels) -> None:
        super().__init__()
        model = decoder_on_meta(recipe, kernels)
        self.config, self.embedding = model.config, model.embedding
        self.layers = model.layers[: recipe.objective.ends_at]
        self.requires_grad_(False)

    def specs(self, recipe: Recipe) -> list[ParameterSpec]:
        held = {name for name, _ in self.named_parameters()}
        return [replace(spec, trained=False) for spec in recipe.parameters if spec.name in held]

    @torch.no_grad()
    def forward(self, ids: Tensor, document_start: Tensor | None, rotary: Sequence[Rotary | None]) -> Tensor:
        """ids int64 [B, T] -> [B, T, C], the state at that boundary. Nothing is dropped."""
        x: Tensor = self.embedding(ids, None)
        for block, tables in zip(self.layers, rotary, strict=False):  # the model has more layers
            x = block(x, tables, document_start, None)
        return x

    def place_rotary_tables(self, device: torch.device | str) -> None:
        """They are the trained model's, which hands them over."""


def keeps_frozen_layers(job: Job) -> bool:
    """Whether the run trains, and its objective reads the model that it began with."""
    return job.recipe.objective.keeps_first_model and job.plan.start_step < job.plan.last_step


def frozen_layers(job: Job, kernels: Kernels, device: torch.device, pads: bool = False) -> FrozenLayers | None:
    """The layers with their weights on a device, in the dtype that they are computed with; None where none are kept."""
    if not keeps_frozen_layers(job):
        return None
    layers, compute = FrozenLayers(job.recipe, kernels), compute_dtype(job.recipe)
    specs = layers.specs(job.recipe)
    weights = {}
    for spec in specs:
        weight = first_weight(job, spec).detach()
        if not is_frozen_copy(spec, compute):
            weight = weight.to(device, torch.float32, copy=True)
        weights[spec.name] = weight
    bind_parameters(layers, specs, weights, compute, device, pads)
    return layers


@torch.no_grad()
def streamed_states(
    layers: FrozenLayers, rows: Sequence[Rows], rotary: Sequence[Rotary | None], device: torch.device
) -> list[Tensor]:
    """For each micro-batch what `layers` gives, [B, T, C]. The layers may lie in host memory: each is on the device
    only while all micro-batches are computed with it.
    """
    with _on(layers.embedding, device):
        states = [layers.embedding(one.ids, None) for one in rows]
    for block, tables in zip(layers.layers, rotary, strict=False):
        with _on(block, device):
            pairs = zip(states, rows, strict=True)
            states = [block(state, tables, one.document_start, None) for state, one in pairs]
    return states


@contextlib.contextmanager
def _on(segment: nn.Module, device: torch.device) -> Iterator[None]:
    held = [(parameter, parameter.data) for parameter in segment.parameters()]
    for parameter, data in held:
        parameter.data = data.to(device)
    yield
    for parameter, data in held:
        parameter.data = data
