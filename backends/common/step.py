"""The arithmetic of a step that two backends share: rows to a device, loss scale, gradient norm, clipping, update.

A function stands here because two backends must give the same bits, or the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from weftrain.core.backend import EvalResult
from weftrain.core.config import OptimizerConfig, Recipe
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.objectives import NEXT_TOKEN, Extras, loss_of, measures_of
from weftrain.core.objectives_section import Objective
from weftrain.core.optim import ParameterGroup
from weftrain.core.order.batch import Batch, BatchSource, EvaluationSource

_NAMES_IN_MESSAGE = 16


class Rows(NamedTuple):
    """A micro-batch on a device, as `Decoder.forward` takes it."""

    ids: torch.Tensor  # int64 [B, T]
    labels: torch.Tensor  # int64 [B, T], -100 where there is no loss
    document_start: torch.Tensor | None  # int32 [B, T]
    extras: Extras | None  # of the objective

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (*self[:3], *(self.extras or ())) if tensor is not None]


def to_device(batch: Batch, device: torch.device) -> Rows:
    """To a CUDA device from page-locked memory, so that the host waits for no copy."""

    def copied(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def if_there(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else copied(array)

    ids = copied(batch.ids)
    labels = ids[:, 1:].contiguous()
    if batch.loss_mask is not None:
        labels = labels.masked_fill(~copied(batch.loss_mask), -100)
    extras = Extras(if_there(batch.token_weights), if_there(batch.reference), if_there(batch.forget))
    given = any(one is not None for one in extras)
    return Rows(ids[:, :-1].contiguous(), labels, if_there(batch.document_start), extras if given else None)


_Loss = TypeVar("_Loss", torch.Tensor, float)


@dataclass(frozen=True)
class LossScale:
    """By what the sums of a global batch, which the head returned, are divided. All numbers are the whole batch's, on
    every rank, before any backward.

    So micro-batches and replicas with different numbers of bearing tokens add up to the large batch's gradient.
    """

    divisor: int  # for the gradient: objective.divisor
    bearing_tokens: int
    objective: Objective = NEXT_TOKEN

    @classmethod
    def of(cls, recipe: Recipe, bearing_tokens: int) -> LossScale:
        objective, rows = recipe.objective, recipe.batch.global_batch_size
        divisor = objective.divisor(bearing_tokens, recipe.tokens_per_step, rows)
        return cls(divisor, bearing_tokens, objective)

    def mean(self, loss: _Loss) -> _Loss:
        """Sum over `divisor` -> the loss that is reported: of next_token the mean over bearing tokens. NaN if there are
        none, so such a step never counts.
        """
        if self.divisor == self.bearing_tokens:
            return loss  # without a bearing token 0 / 0 made it NaN already
        if self.objective.measures and self.bearing_tokens:
            return loss
        return loss * (self.divisor / self.bearing_tokens if self.bearing_tokens else math.nan)

    def reported(self, sums: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and the measures of the global batch, 0-dim each. sums: of what the head returned for each
        micro-batch, over `divisor`.
        """
        return self.mean(loss_of(sums)), measures_of(self.objective, sums)


def evaluate_rows(
    head: Callable[..., torch.Tensor],
    source: EvaluationSource,
    micro_batch_size: int,
    device: torch.device,
    objective: Objective = NEXT_TOKEN,
) -> EvalResult:
    """Held-out loss of a model on one device. head: takes `Rows`, and returns what the model's head returns."""
    total = HeldOutTotal(objective, device)
    with torch.no_grad():
        for first in range(0, source.num_rows, micro_batch_size):
            rows = to_device(source.rows(first, min(micro_batch_size, source.num_rows - first)), device)
            total.add(head(*rows), rows.labels)
    return total.result(source)


class HeldOutTotal:
    """Sums over a held-out set of what the head returns, in float64: `sums`, which several ranks add up."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self._objective = objective
        # of the loss and of each measure the sum and what it is the mean over; then the bearing tokens
        self.sums = torch.zeros(2 * (1 + len(objective.measures)) + 1, dtype=torch.float64, device=device)

    def add(self, found: torch.Tensor, labels: torch.Tensor) -> None:
        """found: what the head returned for `labels`."""
        tokens = (labels >= 0).sum().double()
        self.sums += torch.cat([*([found.reshape(-1)] if found.ndim else [found[None], tokens[None]]), tokens[None]])

    def result(self, source: EvaluationSource) -> EvalResult:
        """Raises BackendError where no token of the set bears a loss."""
        sums = self.sums.cpu()
        if not (tokens := int(sums[-1])):
            raise BackendError(f"held-out set '{source.name}' has no token that bears a loss; check its loss mask")
        table = sums[:-1].unflatten(0, (-1, 2))
        measures = {
            name: float(mean)
            for at, (name, mean) in enumerate(measures_of(self._objective, table).items())
            if table[1 + at, 1]  # of a set without any, there is none
        }
        return EvalResult(float(table[0, 0] / table[0, 1]), tokens, measures)


def padded_rows(source: EvaluationSource, first: int, count: int) -> Batch:
    """Rows first..first+count-1, or fewer and then copies of the first of them that bear no loss."""
    there = min(count, source.num_rows - first)
    batch = source.rows(first, there)
    mask = np.ones(batch.ids[:, 1:].shape, bool) if batch.loss_mask is None else batch.loss_mask
    batch = replace(batch, loss_mask=mask)
    padded = batch.take(np.concatenate([np.arange(there), np.zeros(count - there, np.int64)]))
    assert padded.loss_mask is not None
    padded.loss_mask[there:] = False
    return padded


def present(found: Mapping[str, torch.Tensor | None], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """name -> gradient, in the order of `names`. Raises BackendError for a parameter that the loss did not reach."""
    gradients = {name: found.get(name) for name in names}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise BackendError(f"no gradient reached {missing[0]} (of {len(missing)}): a kernel or the model dropped it")
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def norm_of_each(grad_norm: Callable[..., torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32 [n]: the op grad_norm, of each tensor alone."""
    return torch.stack([grad_norm([gradient]) for gradient in gradients])


def global_norm(norms: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of the parameters' gradient norms, fp32 [n] or 0-dim each, in parameter order: 0-dim fp32.

    As torch.nn.utils.clip_grad_norm_ has it. So a backend that sees one layer at a time computes the bits of one that
    sees all.
    """
    return torch.linalg.vector_norm(norms if isinstance(norms, torch.Tensor) else torch.stack(list(norms)))


def clip_coefficient(norm: torch.Tensor, clip_norm: float | None) -> torch.Tensor:
    """The factor for each gradient, 0-dim fp32: the formula of torch.nn.utils.clip_grad_norm_, or 1."""
    return torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)


def step_happens(
    recipe: Recipe,
    source: BatchSource,
    step: int,
    loss: torch.Tensor,
    norm: torch.Tensor,
    bearing_tokens: int,
    losses: Callable[[], Sequence[torch.Tensor]],
) -> bool:
    """Whether loss and gradient norm (0-dim) of the global batch are finite, so that the update may be made. Otherwise
    raises NonFiniteError, which names the samples, unless the recipe skips such steps.

    losses: what the head returned for each micro-batch of the global batch, in order; called for the message alone.
    """
    finite = bool(torch.isfinite(loss + norm))
    if not finite and recipe.optimizer.non_finite == "halt":
        raise NonFiniteError(_non_finite_message(source, step, losses(), float(norm), bearing_tokens))
    return finite


def _non_finite_message(
    source: BatchSource, step: int, losses: Sequence[torch.Tensor], norm: float, bearing_tokens: int
) -> str:
    happened = f"the step did not happen, weights and optimizer are as after step {step - 1}"
    if not bearing_tokens:
        names = source.sample_names(step, 0, source.global_batch_size)
        return (
            f"step {step}: no token of the global batch bears a loss, so it has neither a loss nor a gradient: "
            f"{happened}; samples: {_some(names)}; correct their loss mask, leave them out with data.skip, or set "
            "optimizer.non_finite=skip"
        )
    losses = [loss_of(sums) for sums in losses]
    bad = [index for index, loss in enumerate(losses) if not torch.isfinite(loss)] or range(len(losses))
    micro = source.global_batch_size // len(losses)
    names = [name for index in bad for name in source.sample_names(step, index * micro, micro)]
    total = math.fsum(float(loss) for loss in losses) if isinstance(bad, range) else "not finite"
    return (
        f"step {step}: loss {total}, gradient norm {norm}: {happened}; samples: {_some(names)}; look at them, lower "
        "the learning rate, or set optimizer.non_finite=skip"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_IN_MESSAGE} more" if len(names) > _NAMES_IN_MESSAGE else ""
    return ", ".join(names[:_NAMES_IN_MESSAGE]) + more


# a group's names, and their compute copies or None
UpdateSets = list[tuple[ParameterGroup, list[str], list[torch.Tensor] | None]]


def update_sets(
    groups: Sequence[ParameterGroup], copies: Mapping[str, torch.Tensor], held: Container[str] | None = None
) -> UpdateSets:
    """What each call of the op adamw updates: parameters of one group, all with compute copies or none."""
    sets: UpdateSets = []
    for group in (group for group in groups if group.optimizer == "adamw"):
        names = [name for name in group.parameters if held is None or name in held]
        with_copy = [name for name in names if name in copies]
        without = [name for name in names if name not in copies]
        if with_copy:
            sets.append((group, with_copy, [copies[name] for name in with_copy]))
        if without:
            sets.append((group, without, None))
    return sets


def held_by_device(weights: Mapping[str, torch.Tensor]) -> dict[torch.device, set[str]]:
    """Device -> names of the tensors on it that have elements. An optimizer's op takes tensors of one device."""
    found: dict[torch.device, set[str]] = {}
    for name, tensor in weights.items():
        if tensor.numel():
            found.setdefault(tensor.device, set()).add(name)
    return found


def update(
    adamw: Callable[..., Any],
    sets: UpdateSets,
    planes: Mapping[str, Mapping[str, torch.Tensor]],
    gradients: Mapping[str, torch.Tensor],
    config: OptimizerConfig,
    rates: Mapping[str, float],
    update_index: int,
    gradient_scale: torch.Tensor,
) -> None:
    """Update the planes weights, exp_avg and exp_avg_sq in place. update_index: AdamW's t, from 1."""
    for group, names, copies in sets:
        adamw(
            [planes["weights"][name] for name in names],
            [gradients[name] for name in names],
            [planes["exp_avg"][name] for name in names],
            [planes["exp_avg_sq"][name] for name in names],
            copies,
            learning_rate=rates[group.name],
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=group.weight_decay,
            update_index=update_index,
            eps_placement=config.eps_placement,
            gradient_scale=gradient_scale,
        )
