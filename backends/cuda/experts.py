"""Mixtures of experts across ranks: what their routers did in the whole global batch, and layouts that have none."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weftrain.backends.cuda.options import CudaOptions
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.experts import take_tallies


def check_experts(options: CudaOptions, recipe: Recipe) -> None:
    """Raises BackendError, with the key, for options that a model with experts cannot have."""
    if recipe.model.experts is None:
        return
    why = {
        "tensor_parallel": "experts are not cut, and the loss that balances them is of whole rows: set 1",
        "context_parallel": "the loss that balances experts is of whole rows: set 1",
        "float8": "the products of experts have no float8: set false",
        "compile": "how many tokens an expert gets is not known when a graph is compiled: set false",
    }
    for name, reason in why.items():
        if (value := getattr(options, name)) != CudaOptions.model_fields[name].default:
            raise BackendError(f"model.experts is given and backend.options.{name} is {str(value).lower()}: {reason}")


def total_tallies(model: nn.Module) -> dict[str, Tensor]:
    """`take_tallies` of all ranks added: of integers, so that their order does not matter. A collective."""
    found = take_tallies(model)
    if dist.get_world_size() == 1 or not found:
        return found
    flat = torch.stack(list(found.values()))
    dist.all_reduce(flat)
    return dict(zip(found, flat.unbind(), strict=True))
