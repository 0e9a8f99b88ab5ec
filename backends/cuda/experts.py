"""Mixtures of experts across ranks: layouts that have none, experts divided between ranks, and what all routers did.

With expert_parallel a rank holds some of each layer's experts, [E / ranks, ..], and FSDP cuts these over the other
ranks. The ranks of one group, which have tokens of their own, of other rows or of other parts of them, send each token
to the ranks of its experts and get back what these make of it: an all-to-all each way, and the same again backward.
Everything else of the model, the router too, is as it is without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from weftrain.backends.cuda.options import CudaOptions
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.experts import ExpertFeedForwards, Reorder, Stacked, Tally, inverse, mixtures_of, take_tallies
from weftrain.core.model_config import ModelConfig


def check_experts(options: CudaOptions, recipe: Recipe) -> None:
    """Raises BackendError, with the key, for options that a model with experts cannot have."""
    if recipe.model.experts is None:
        return
    why = {
        "float8": "the products of experts have no float8: set false",
        "compile": "experts, which are not compiled, were not tried between compiled parts across ranks: set false",
    }
    if recipe.precision.numerics == "replayable":
        for name in ("tensor_parallel", "context_parallel"):
            if (degree := getattr(options, name)) > 1:
                raise BackendError(
                    f"model.experts is given, precision.numerics is replayable and backend.options.{name} is {degree}: "
                    "an expert's gradient would be added from parts of rows, in another order than of whole ones: set "
                    f"{name}=1, or precision.numerics=fast"
                )
    for name, reason in why.items():
        if (value := getattr(options, name)) != CudaOptions.model_fields[name].default:
            raise BackendError(f"model.experts is given and backend.options.{name} is {str(value).lower()}: {reason}")


def check_division(options: CudaOptions, model: ModelConfig, shards: int) -> None:
    """Raises BackendError, with the key, where experts cannot be divided between ranks as asked. shards: ranks of a
    pipeline stage that hold parts of one copy.
    """
    ranks, experts, key = options.expert_parallel, model.experts, "backend.options.expert_parallel"
    if ranks == 1:
        return
    if experts is None:
        raise BackendError(f"{key} is {ranks}, and the recipe has no model.experts: set {key}=1")
    if experts.count % ranks:
        raise BackendError(
            f"model.experts.count {experts.count} is no multiple of {key} {ranks}: set {key} to a divisor of it"
        )
    if shards % ranks:
        raise BackendError(
            f"{shards} ranks that share one copy of the model are no multiple of {key} {ranks}: set {key} to a divisor "
            "of their number, or start other numbers of ranks"
        )
    each, others = experts.count // ranks, shards // ranks
    sizes = {"model.experts.intermediate_size": experts.intermediate_size, "model.hidden_size": model.hidden_size}
    if each % others and any(size % others for size in sizes.values()):
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise BackendError(
            f"{key} {ranks} leaves {each} of {experts.count} experts to {others} ranks, and neither they nor {told} "
            f"are multiples of {others}: set another {key}"
        )


def fsdp_dimension(shape: Sequence[int], parts: int) -> int:
    """The dimension of experts' matrices, [E, out, in], that FSDP cuts: the first, unless only the second divides
    evenly. An uneven first one leaves some ranks without any.
    """
    return 1 if shape[0] % parts and shape[1] % parts == 0 else 0


def split_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each rank of the mesh its part of each layer's experts, and send tokens to them. For a model on `meta`."""
    for module in model.modules():
        if not isinstance(module, ExpertFeedForwards):
            continue
        for stacked in (one for one in module.children() if isinstance(one, Stacked)):
            whole = stacked.weight
            own = whole.new_empty(len(whole) // mesh.size(), *whole.shape[1:])
            spread = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            stacked.weight = nn.Parameter(spread, whole.requires_grad)
        module.through = partial(_through_ranks, module, mesh)  # type: ignore[method-assign]


def _through_ranks(experts: ExpertFeedForwards, mesh: DeviceMesh, rows: Tensor, ends: Tensor) -> Tensor:
    """`ExpertFeedForwards.through`, by the ranks that hold the experts. rows [n, C], expert by expert, ends [E]."""
    ranks, group = mesh.size(), mesh.get_group()
    leaving = ends.diff(prepend=ends.new_zeros(1)).long()  # [E]: rows of each expert
    coming = torch.empty_like(leaving)
    dist.all_to_all_single(coming, leaving, group=group)
    leaving, coming = leaving.view(ranks, -1), coming.view(ranks, -1)  # [ranks, e]: to each rank, and from each
    sent, got = torch.stack([leaving.sum(1), coming.sum(1)]).tolist()
    arrived: Tensor = _Exchange.apply(rows, sent, got, group)  # rank by rank, and of each expert by expert
    numbers = torch.arange(coming.shape[1], device=rows.device).repeat(ranks)
    of_expert = numbers.repeat_interleave(coming.flatten(), output_size=sum(got))
    order = of_expert.sort(stable=True).indices
    back = inverse(order)
    weights = (one.weight for one in (experts.gate_proj, experts.up_proj, experts.down_proj))
    own = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights)
    own_ends = coming.sum(0).cumsum(0).int()
    found = experts.products(Reorder.apply(arrived, order, back), own_ends, *own)
    returned: Tensor = _Exchange.apply(Reorder.apply(found, back, order), got, sent, group)
    return returned


class _Exchange(torch.autograd.Function):
    """x [sum of sent, C] -> [sum of got, C]: rows sent[r] go to rank r of the group, got[r] come from it. Backward
    sends their gradients the other way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        return _exchanged(x, sent, got, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(dy, ctx.got, ctx.sent, ctx.group), None, None, None


def _exchanged(x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    found = x.new_empty(sum(got), x.shape[1])
    dist.all_to_all_single(found, x.contiguous(), got, sent, group=group)
    return found


def total_tallies(model: nn.Module, device: torch.device, stages: bool) -> dict[str, Tensor]:
    """`take_tallies` of all ranks added: of integers, so that their order does not matter. stages: of a pipeline, whose
    ranks have computed some of the layers each. A collective.
    """
    found = take_tallies(model)
    if stages:
        found = {
            name: found.get(name, Tally.nothing(mixture.experts.count, device))
            for name, mixture in mixtures_of(model).items()
        }
    if dist.get_world_size() == 1 or not found:
        return found
    flat = torch.stack(list(found.values()))
    dist.all_reduce(flat)
    return dict(zip(found, flat.unbind(), strict=True))
