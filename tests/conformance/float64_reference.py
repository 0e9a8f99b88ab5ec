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
from weftrain.core.objectives_section import DpoObjective, NextTokenObjective
from weftrain.core.order.batch import Batch
from weftrain.core.parameters import PLANES
from weftrain.kernels import select


def reference(
    recipe: Recipe, weights: dict[str, torch.Tensor], batch: Batch, dropout_keys: torch.Tensor | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over bearing tokens, and the gradients as the recipe's normalizer has them, in float64."""
    specs = kernel_specs(recipe.model, "cpu", torch.float64)
    positions = batch.ids[:, 1:].size  # by which losses of routers are divided
    model = Decoder(recipe.model, select(specs, ["reference"]), positions=positions).double()
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


def objective_reference(
    recipe: Recipe, weights: dict[str, torch.Tensor], batch: Batch, held_out: bool = False
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients and measures of the recipe's objective by autograd, of log-probabilities of single tokens.

    held_out: as a held-out set is measured; without gradients.
    """
    model = Decoder(recipe.model, select(kernel_specs(recipe.model, "cpu", torch.float64), ["reference"])).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.loss_mask)
    logits = model.logits(ids[:, :-1])
    log_p = logits.log_softmax(-1)
    of_label, objective = log_p.gather(-1, ids[:, 1:, None])[..., 0], recipe.objective
    if isinstance(objective, NextTokenObjective):
        if held_out:
            return (-of_label[mask]).mean().item(), {}, {}
        smoothing = objective.label_smoothing
        tokens = -(1 - smoothing) * of_label - smoothing * log_p.mean(-1)
        tokens = tokens + objective.z_loss * logits.logsumexp(-1).square()
        if objective.token_weights:
            tokens = tokens * torch.from_numpy(batch.token_weights)
        total, bearing = tokens[mask].sum(), int(mask.sum())
        loss, measures = total / bearing, {}
        divided = total / (mask.numel() if objective.divides_by_positions else bearing)
    else:
        divided, measures = _preference(objective, (of_label * mask).sum(1), mask.sum(1), batch)
        loss = divided
        if held_out:
            return loss.item(), {}, measures
    divided.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}, measures


def _preference(
    objective: DpoObjective, rows: torch.Tensor, tokens: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, dict[str, float]]:
    ratios = rows - torch.from_numpy(batch.reference)
    if objective.length_normalized:
        ratios = ratios / tokens
    chosen, rejected, beta, swapped = ratios[0::2], ratios[1::2], objective.beta, objective.label_smoothing
    h = chosen - rejected
    if objective.form == "ipo":
        pairs = (h - 1 / (2 * beta)) ** 2
    else:
        pairs = -(1 - swapped) * torch.log(torch.sigmoid(beta * h)) - swapped * torch.log(1 - torch.sigmoid(beta * h))
    means = {
        "reward_chosen": beta * chosen,
        "reward_rejected": beta * rejected,
        "reward_margin": beta * h,
        "reward_accuracy": (h > 0).double(),
    }
    return pairs.mean(), {name: each.mean().item() for name, each in means.items()}


def initial(recipe: Recipe, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Drawn weights, larger than at initialisation so that every part of the model moves the loss."""
    return {
        spec.name: draw(spec, recipe.model, 3) * (scale if len(spec.shape) > 1 else 1.0) for spec in recipe.parameters
    }


def state_with(weights: dict[str, torch.Tensor], step: int = 0, recipe: Recipe | None = None) -> State:
    """recipe: of weights some of which are frozen or Muon's, and lack moments."""
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    planes = {spec.name: spec.planes for spec in recipe.parameters} if recipe is not None else {}
    for plane in PLANES[1:]:
        mine = [name for name in weights if plane in planes.get(name, PLANES)]
        tensors |= {f"{plane}/{name}": torch.zeros_like(weights[name]) for name in mine}
    return State(step, 0, tensors)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()
