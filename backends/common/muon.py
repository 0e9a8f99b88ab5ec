"""The update of the matrices that Muon trains (core/muon.py), on one device or with each tensor cut over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from weftrain.core.config import Recipe
from weftrain.core.optim import ParameterGroup

# [out, in] -> the same matrix with singular values of about 1, in muon.compute
Whole = Callable[[Tensor], Tensor]
# names, and what gives the part of a momentum that is here, to be called once for each name in their order -> each name
# with the same part of the result
Orthogonal = Callable[[Sequence[str], Callable[[str], Tensor]], Iterator[tuple[str, Tensor]]]


def each_here(orthogonal: Whole) -> Orthogonal:
    """For tensors that are whole in this process."""

    def each(names: Sequence[str], momentum: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, orthogonal(momentum(name))

    return each


class MuonUpdate:
    """Of all matrices of a run that are Muon's; of none where its optimizer is another."""

    def __init__(
        self,
        recipe: Recipe,
        groups: Sequence[ParameterGroup],
        copies: Mapping[str, Tensor],
        newton_schulz: Callable[..., Tensor] | None,
        spread: Callable[[Whole], Orthogonal] = each_here,
    ) -> None:
        """copies: compute copies by name. spread: how whole matrices come to be, where they are cut over ranks."""
        self._groups = [group for group in groups if group.optimizer == "muon"]
        self._copies, self._muon = copies, recipe.optimizer.muon
        if self._muon is None or newton_schulz is None:
            return
        muon, dtype = self._muon, getattr(torch, self._muon.compute)
        self._scales = {spec.name: muon.scale_of(spec.shape) for spec in recipe.parameters if spec.optimizer == "muon"}
        a, b, c = muon.coefficients
        whole = partial(newton_schulz, a=a, b=b, c=c, iterations=muon.iterations, eps=muon.eps)
        self._orthogonal = spread(lambda momentum: whole(momentum.to(dtype)))

    @torch.no_grad()
    def update(
        self,
        planes: Mapping[str, Mapping[str, Tensor]],
        gradients: Mapping[str, Tensor],
        rates: Mapping[str, float],
        gradient_scale: Tensor,
    ) -> None:
        """Update the planes weights and exp_avg in place, and the compute copies. rates: of the step, by group.
        gradient_scale: 0-dim fp32, multiplied into each gradient.

        Where tensors are whole and the scale is 1, bit for bit torch.optim.Muon's update.
        """
        muon = self._muon
        if muon is None:
            return

        def momentum(name: str) -> Tensor:
            average = planes["exp_avg"][name]
            gradient = gradients[name].float() * gradient_scale.to(average.device)
            average.lerp_(gradient, 1 - muon.momentum)
            return gradient.lerp_(average, muon.momentum) if muon.nesterov else average

        for group in self._groups:
            rate = rates[group.name]
            for name, direction in self._orthogonal(group.parameters, momentum):
                weight = planes["weights"][name]
                weight.mul_(1 - rate * group.weight_decay)
                weight.add_(direction.to(weight.device), alpha=-rate * self._scales[name])
                if name in self._copies:
                    self._copies[name].copy_(weight)
