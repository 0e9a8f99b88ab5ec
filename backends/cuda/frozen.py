"""The frozen layers of an objective that reads the model that the run began with (common/frozen_layers.py), across
ranks: split as the trained model is, so that a rank has the state of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weftrain.backends.common.decoder import Kernels, bind_parameters, compute_dtype
from weftrain.backends.common.frozen_layers import FrozenLayers
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.float8 import use_float8
from weftrain.backends.cuda.models import freeze, split
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.parallel import Meshes
from weftrain.backends.cuda.sharded import Sharded
from weftrain.backends.cuda.stage import RankTokens, whole_part
from weftrain.core.config import Recipe
from weftrain.core.objectives import Extras
from weftrain.core.parameters import ParameterSpec


class FrozenAcrossRanks:
    """Built on every rank: a collective. `place` gives it each of the parameters of `specs`."""

    def __init__(
        self,
        recipe: Recipe,
        options: CudaOptions,
        kernels: Kernels,
        shape: Degrees,
        meshes: Meshes,
        device: torch.device,
    ) -> None:
        self._layers, dtype = FrozenLayers(recipe, kernels), compute_dtype(recipe)
        self.specs: Sequence[ParameterSpec] = self._layers.specs(recipe)
        self._sharded: Sharded | None = None
        if options.parallel == "ddp":
            weights = {spec.name: torch.zeros(spec.shape, device=device) for spec in self.specs}
            pads = recipe.precision.numerics != "replayable"  # padded products have other bits
            self._bound = bind_parameters(self._layers, self.specs, weights, dtype, device, pads)
            return
        if options.in_float8 is not None:
            use_float8(self._layers, recipe.model, options.in_float8, shape.tensor)
        part = whole_part(self._layers)
        split(self._layers, part.blocks, recipe.model, options, shape, meshes, dtype)
        freeze(self._layers, self.specs, dtype if options.in_float8 is None else torch.float32)
        self._sharded = Sharded(self._layers, [part], self.specs, meshes, options, dtype, device)

    def place(self, name: str, whole: Tensor) -> None:
        """Keep this rank's part of a weight, fp32, that every rank was given. A collective."""
        if self._sharded is None:
            self._bound.place_frozen(name, whole)
            self._bound.weights.pop(name)  # it is not saved, so nobody needs more digits than are computed with
            return
        self._sharded.place_weight(name, whole)
        self._sharded.weights.pop(name)

    def with_state(self, tokens: RankTokens) -> RankTokens:
        """The tokens with the state that the objective reads. A collective."""
        with torch.no_grad():
            state: Tensor = self._layers(tokens.ids, tokens.document_start, tokens.rotary)
        if self._sharded is not None:
            self._sharded.refresh()  # frees the weights that the root module gathered
        return tokens._replace(extras=(tokens.extras or Extras())._replace(frozen=state))
