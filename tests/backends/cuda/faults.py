"""Mistakes in how ranks split a model, planted in every rank of a world by the name of a run's recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from weftrain.backends.cuda import parallel
from weftrain.backends.cuda.engine import CudaRun
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.parallel import HeadExchange, SplitNorm
from weftrain.backends.cuda.sharded import Sharded
from weftrain.backends.cuda.stage import RankTokens
from weftrain.core.config import Recipe
from weftrain.core.order.batch import Batch

Patch = pytest.MonkeyPatch


def gradients_of_others_forgotten(patch: Patch) -> None:
    """A rank takes its own gradient for the part that it computed, whoever else uses it."""

    def gathered(x: Tensor, mesh: Any) -> Tensor:
        spread = DTensor.from_local(x.contiguous(), mesh, [Shard(x.ndim - 1)], run_check=False)
        return spread.redistribute(placements=[Replicate()]).to_local()

    patch.setattr(parallel, "gather_features", gathered)


def parts_of_a_head_in_another_order(patch: Patch) -> None:
    right = parallel.gather_features

    def gathered(x: Tensor, mesh: Any) -> Tensor:
        return right(x, mesh).unflatten(-1, (mesh.size(), -1)).flip(-2).flatten(-2)

    patch.setattr(parallel, "gather_features", gathered)


def statistics_of_own_heads(patch: Patch) -> None:
    patch.setattr(SplitNorm, "_mean", lambda self, x: x.mean(-1, keepdim=True))


def norm_weights_of_another_rank(patch: Patch) -> None:
    right = SplitNorm.__call__

    def call(self: SplitNorm, x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return right(self, x, weight.roll(x.shape[-1]), **options)

    patch.setattr(SplitNorm, "__call__", call)


def _norm_not_summed(name: str) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        right = Sharded.take_gradients

        def take(self: Sharded) -> dict[str, Tensor]:
            self._norms = [norm for norm in self._norms if not norm.endswith(f"{name}.weight")]
            return right(self)

        patch.setattr(Sharded, "take_gradients", take)

    return plant


def heads_dealt_in_turn(patch: Patch) -> None:
    """Copies of key heads 0, 1, 0, 1 for ranks whose queries read 0, 0, 1, 1."""

    def by_rank(self: HeadExchange, x: Tensor) -> Tensor:
        ranks = self._mesh.size()
        return x.repeat(1, 1, max(1, ranks // x.shape[2]), 1).unflatten(2, (ranks, -1))

    patch.setattr(HeadExchange, "_by_rank", by_rank)


def window_forgotten(patch: Patch) -> None:
    right = HeadExchange.__call__

    def call(self: HeadExchange, *arguments: Tensor, **options: Any) -> Tensor:
        return right(self, *arguments, **{**options, "window": None})

    patch.setattr(HeadExchange, "__call__", call)


def positions_of_the_first_rank(patch: Patch) -> None:
    right = CudaRun._tokens

    def tokens(self: CudaRun, batch: Batch) -> RankTokens:
        found = right(self, batch)
        return found._replace(rotary=self._decoder.rotary(found.ids.shape[1] * self._degrees.tensor))

    patch.setattr(CudaRun, "_tokens", tokens)


# a recipe's name -> what is planted
FAULTS: dict[str, Callable[[Patch], None]] = {
    "k_not_summed": gradients_of_others_forgotten,
    "head_order": parts_of_a_head_in_another_order,
    "statistics_not_summed": gradients_of_others_forgotten,
    "own_statistics": statistics_of_own_heads,
    "norm_weights": norm_weights_of_another_rank,
    "k_norm_not_summed": _norm_not_summed("k_norm"),
    "norm_after_not_summed": _norm_not_summed("ffn_norm"),
    "dealt_in_turn": heads_dealt_in_turn,
    "window_forgotten": window_forgotten,
    "positions": positions_of_the_first_rank,
}


@contextlib.contextmanager
def planted() -> Iterator[None]:
    """While it lasts, a run of the cuda backend whose recipe has such a name has that fault, and others have none."""
    build, fault = Patch(), Patch()
    right = CudaRun._build

    def with_fault(self: CudaRun, recipe: Recipe, options: CudaOptions) -> None:
        fault.undo()
        if recipe.name in FAULTS:
            FAULTS[recipe.name](fault)
        right(self, recipe, options)

    build.setattr(CudaRun, "_build", with_fault)
    try:
        yield
    finally:
        fault.undo()
        build.undo()
