"""The arithmetic of a step that two backends share: rows to a device, loss scale, gradient norm, clipping, update.

A function stands here because two backends must give the same bits, or the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from weftrain.core.backend import EvalResult
from weftrain.core.config import OptimizerConfig, Recipe
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.optim import ParameterGroup
from weftrain.core.order.batch import Batch, BatchSource, EvaluationSource

_NAMES_IN_MESSAGE = 16


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """ids and labels int64 [B, T] (labels -100 where masked), document_start int32 [B, T] or None.

    To a CUDA device from page-locked memory, so that the host waits for no copy.
    """

    def copied(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    ids = copied(batch.ids)
    labels = ids[:, 1:].contiguous()
    if batch.loss_mask is not None:
        labels = labels.masked_fill(~copied(batch.loss_mask), -100)
    document_start = None if batch.document_start is None else copied(batch.document_start)
    return ids[:, :-1].contiguous(), labels, document_start


_Loss = TypeVar("_Loss", torch.Tensor, float)


@dataclass(frozen=True)
class LossScale:
    """By what the sum of a global batch's token losses is divided. Both numbers are the whole batch's, on every rank,
    before any backward.

    So micro-batches and replicas with different numbers of bearing tokens add up to the large batch's gradient.
    """

    divisor: int  # for the gradient: objective.normalizer
    bearing_tokens: int

    @classmethod
    def of(cls, recipe: Recipe, bearing_tokens: int) -> LossScale:
        return cls(
            bearing_tokens if recipe.objective.normalizer == "bearing_tokens" else recipe.tokens_per_step,
            bearing_tokens,
        )

    def mean(self, loss: _Loss) -> _Loss:
        """Sum over `divisor` -> mean over bearing tokens; NaN if there are none, so such a step never counts."""
        if self.divisor == self.bearing_tokens:
            return loss  # without a bearing token 0 / 0 made it NaN already
        return loss * (self.divisor / self.bearing_tokens if self.bearing_tokens else math.nan)


def evaluate_rows(
    loss: Callable[..., torch.Tensor], source: EvaluationSource, micro_batch_size: int, device: torch.device
) -> EvalResult:
    """Held-out loss of a model on one device. loss(ids, labels, document_start): the sum over the tokens, 0-dim."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for first in range(0, source.num_rows, micro_batch_size):
            rows = source.rows(first, min(micro_batch_size, source.num_rows - first))
            ids, labels, document_start = to_device(rows, device)
            total += float(loss(ids, labels, document_start))
            tokens += int((labels >= 0).sum())
    return mean_loss(source, total, tokens)


def mean_loss(source: EvaluationSource, total: float, tokens: int) -> EvalResult:
    """Raises BackendError where no token of the set bears a loss."""
    if tokens == 0:
        raise BackendError(f"held-out set '{source.name}' has no token that bears a loss; check its loss mask")
    return EvalResult(total / tokens, tokens)


def slice_rows(batch: Batch, first: int, count: int) -> Batch:
    """Rows first..first+count-1 of a batch, as views."""
    rows = slice(first, first + count)
    mask, start = batch.loss_mask, batch.document_start
    return Batch(batch.ids[rows], None if mask is None else mask[rows], None if start is None else start[rows])


def padded_rows(source: EvaluationSource, first: int, count: int) -> Batch:
    """Rows first..first+count-1, or fewer and then copies of the first of them that bear no loss."""
    there = min(count, source.num_rows - first)
    batch = source.rows(first, there)
    mask = np.ones(batch.ids[:, 1:].shape, bool) if batch.loss_mask is None else batch.loss_mask
    more = np.zeros(count - there, np.int64)
    keep = np.concatenate([np.arange(there), more])
    mask = np.concatenate([mask, np.zeros((len(more), mask.shape[1]), bool)])
    start = batch.document_start
    return Batch(batch.ids[keep], mask, None if start is None else start[keep])


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

    losses: of each micro-batch of the global batch, in order; called for the message alone.
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
    for group in groups:
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
