"""Loss and gradient norm of the global batch, from what each rank has of them. Collectives: every rank calls alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from weftrain.backends.common.decoder import Kernels
from weftrain.backends.common.phase_clock import PhaseClock
from weftrain.backends.common.step import LossScale
from weftrain.backends.common.sums import tree_sum
from weftrain.backends.common.tree_norms import norms_of_rows, row_squares, tree_global_norm
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.models import RankModel
from weftrain.backends.cuda.world import World


@dataclass(frozen=True)
class StageRanks:
    """Of a pipeline: the ranks that have the head, the group of this rank's pipeline, all trained parameters, and those
    that two stages have.
    """

    heads: range
    group: dist.ProcessGroup
    parameters: Sequence[str]
    twice: frozenset[str] = frozenset()


class Totals:
    """held: for each device, the parameters that lie there. widths: `tree_norms.row_widths`, where sums must not follow
    the layout; losses are then added in the order of the rows. stages: of a pipeline.
    """

    def __init__(
        self,
        world: World,
        clock: PhaseClock,
        kernels: Kernels,
        model: RankModel,
        held: Mapping[torch.device, set[str]],
        shape: Degrees,
        widths: Mapping[str, int] | None,
        stages: StageRanks | None = None,
    ) -> None:
        self._stages = stages
        self._world, self._clock, self._kernels, self._model = world, clock, kernels, model
        self._held, self._shape, self._widths = held, shape, widths
        self._owners: dict[torch.device, Tensor] = {}

    def loss_and_norm(
        self, losses: list[Tensor], scale: LossScale, gradients: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, gradient norm and measures, 0-dim fp32 each, from what the head returned for this rank's micro-batches
        and from its parts of gradients; squares are summed in float64.
        """
        self._clock.to("clip")
        if self._widths is not None:
            return self._in_tree(losses, scale, gradients, self._widths)
        device = self._world.device
        square = torch.zeros((), dtype=torch.float64, device=device)
        for where, held in self._held.items():
            names = [name for name in gradients if name in held]
            norms = self._kernels.on[where.type].norms([gradients[name] for name in names])
            square = square + (norms.double() ** 2 / self._owners_of(names, where)).sum().to(device)
        own = torch.stack(losses).sum(0).double()
        both = torch.cat([own.reshape(-1), square[None]])
        if self._world.size > 1:
            self._clock.to("communication")
            dist.all_reduce(both)
            self._clock.to("clip")
        sums = both[:-1].view_as(own).float()
        loss, measures = scale.reported(sums)
        return loss, both[-1].sqrt().float(), measures

    def _in_tree(
        self, losses: list[Tensor], scale: LossScale, gradients: Mapping[str, Tensor], widths: Mapping[str, int]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same with bits that do not depend on the number of ranks or the layout."""
        device = self._world.device
        squares = {name: row_squares(gradient, widths[name]) for name, gradient in gradients.items()}
        self._clock.to("communication")
        whole = self._model.gather_rows(squares)
        total = tree_sum(self.losses(losses))
        self._clock.to("clip")
        norms = norms_of_rows([whole[name].to(device) for name in gradients])
        norm = tree_global_norm(norms if self._stages is None else self._of_all_stages(norms, list(gradients)))
        loss, measures = scale.reported(total.to(device))
        return loss, norm, measures

    def _of_all_stages(self, norms: Tensor, names: Sequence[str]) -> Tensor:
        """fp32 [n of this rank] -> [n of all stages], in the parameters' order. All but one of the summands are 0."""
        assert self._stages is not None
        places = {name: place for place, name in enumerate(self._stages.parameters)}
        found = norms.new_zeros(len(places))
        found[[places[name] for name in names]] = norms
        dist.all_reduce(found, group=self._stages.group)
        return found

    def losses(self, own: list[Tensor]) -> list[Tensor]:
        """What the head returned for all micro-batches, in order; a row split over several ranks has the sum of its
        parts, and one that several ranks compute is taken once.
        """
        mine = torch.stack(own).cpu()
        found = [torch.empty_like(mine) for _ in range(self._world.size)]
        if self._world.size == 1:
            return own
        with self._world.together("gather the losses"):
            dist.all_gather(found, mine)
        if self._stages is not None:
            found = [found[rank] for rank in self._stages.heads]
        found, split = found[:: self._shape.copies], self._shape.sequence
        groups = [torch.stack(found[first : first + split]).sum(0) for first in range(0, len(found), split)]
        return [loss for group in groups for loss in group.unbind()]

    def _owners_of(self, names: list[str], device: torch.device) -> Tensor:
        """float64 [n]: how many ranks own the same piece of each parameter that lies there; they do not change."""
        if device not in self._owners:
            twice = frozenset() if self._stages is None else self._stages.twice
            owners = [self._model.owners(name) * (2 if name in twice else 1) for name in names]
            self._owners[device] = torch.tensor(owners, dtype=torch.float64, device=device)
        return self._owners[device]
