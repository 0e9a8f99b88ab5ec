"""What one batch's loss and gradients are, independent of every backend: the decoder with reference kernels in float64,
torch's autograd.
"""

from __future__ import annotations

import torch

from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.initialization import draw
from weftrain.core.lora import attach_adapters
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.order.batch import Batch
from weftrain.kernels import select


def reference(
    recipe: Recipe, weights: dict[str, torch.Tensor], batch: Batch, dropout_keys: torch.Tensor | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over bearing tokens, and the gradients as the recipe's normalizer has them, in float64."""
    specs = kernel_specs(recipe.model, "cpu", torch.float64)
    model = Decoder(recipe.model, select(specs, ["reference"])).double()
    attach_adapters(model, recipe.parameters, recipe.tuning.lora)
    with torch.no_grad():
        for spec in recipe.parameters:
            model.get_parameter(spec.name).copy_(weights[spec.name]).requires_grad_(spec.trained)
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
        spec.name: draw(spec, recipe.model, 3) * (scale if len(spec.shape) > 1 else 1.0) for spec in recipe.parameters
    }


def state_with(weights: dict[str, torch.Tensor], step: int = 0, recipe: Recipe | None = None) -> State:
    """recipe: of weights of which some are frozen, and have no moments."""
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    trained = weights if recipe is None else [spec.name for spec in recipe.parameters if spec.trained]
    for plane in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{plane}/{name}": torch.zeros_like(weights[name]) for name in trained}
    return State(step, 0, tensors)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()
