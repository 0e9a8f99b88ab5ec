"""What one batch's loss and gradients are, independent of every backend: the decoder with reference kernels in float64,
torch's autograd.
"""

from __future__ import annotations

import torch

from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.initialization import draw
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.order.batch import Batch
from weftrain.core.parameters import parameter_specs
from weftrain.kernels import select


def reference(
    recipe: Recipe, weights: dict[str, torch.Tensor], batch: Batch, dropout_keys: torch.Tensor | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over bearing tokens, and the gradients as the recipe's normalizer has them, in float64."""
    specs = kernel_specs(recipe.model, "cpu", torch.float64)
    model = Decoder(recipe.model, select(specs, ["reference"])).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    ids = torch.from_numpy(batch.ids)
    labels = ids[:, 1:].clone()
    if batch.loss_mask is not None:
        labels[~torch.from_numpy(batch.loss_mask)] = -100
    start = None if batch.document_start is None else torch.from_numpy(batch.document_start)
    total, bearing = model(ids[:, :-1], labels, start, dropout_keys=dropout_keys), int((labels >= 0).sum())
    (total / (bearing if recipe.objective.normalizer == "bearing_tokens" else labels.numel())).backward()
    return total.item() / bearing, {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def initial(recipe: Recipe, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Drawn weights, larger than at initialisation so that every part of the model moves the loss."""
    return {
        spec.name: draw(spec, recipe.model, 3) * (scale if len(spec.shape) > 1 else 1.0)
        for spec in parameter_specs(recipe.model)
    }


def state_with(weights: dict[str, torch.Tensor], step: int = 0) -> State:
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    for plane in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{plane}/{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    return State(step, 0, tensors)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()
