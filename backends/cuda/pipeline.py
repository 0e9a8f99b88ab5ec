"""A step's micro-batches through the stages of a pipeline, by the schedules of torch.distributed.pipelining.

Every rank reads the rows of all its micro-batches, so between the stages nothing travels but the residual stream and
its gradient, in fp32, as they are within one process: where the layers are cut changes no arithmetic. Their shapes are
told beforehand; the schedules would find them out otherwise, and send them to one another as pickles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from weftrain.backends.common.phase_clock import PhaseClock
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.pipeline_layout import bubble_share, rank_of_stage, stage_count
from weftrain.backends.cuda.stage import MicroBatch, Stage
from weftrain.backends.cuda.world import World
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.objectives import loss_of

OLDEST_TORCH = "2.13"  # whose schedules were run here; before 2.8 they could hang over gloo
_SCHEDULES = {
    "1f1b": "Schedule1F1B",
    "gpipe": "ScheduleGPipe",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}


def schedule_class(options: CudaOptions) -> Any:
    """torch's class of the schedule. An older torch does not have all of them. Raises BackendError."""
    if torch.__version__ < OLDEST_TORCH:
        raise BackendError(
            f"backend.options.pipeline_parallel is {options.pipeline_parallel}, and torch {torch.__version__} has "
            f"schedules that were not tried: install torch {OLDEST_TORCH} or newer, or set "
            "pipeline_parallel=1"
        )
    return getattr(pipelining, _SCHEDULES[options.pipeline_schedule])


class StageModel(Protocol):
    """What the schedule asks of the model across ranks (models.py)."""

    def micro_batch(self, last: bool, part: int = 0) -> AbstractContextManager[None]: ...


class _Called(nn.Module):
    """A stage as the schedules see it. Where they see fully_shard they call its reduction themselves, once a step; the
    model across ranks has its own times for that, and a tree to add in.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.stage(x)
        return found


class _TimedStage(PipelineStage):
    """A stage whose passes the clock sees, and whose gradients the model across ranks takes after each backward."""

    def __init__(
        self, model: StageModel, part: int, clock: PhaseClock, module: Stage, *rest: Any, **shapes: Any
    ) -> None:
        super().__init__(_Called(module), *rest, **shapes)
        self._model, self._part, self._clock, self._module = model, part, clock, module

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        self._clock.to("forward")
        self._module.number = fwd_chunk_id
        found = super().forward_one_chunk(fwd_chunk_id, *arguments, **options)
        self._clock.to("pipeline")
        return found

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._clock.to("backward")
        with self._model.micro_batch(last_backward, self._part):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._clock.to("pipeline")

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        self._clock.to("backward")
        with self._model.micro_batch(last_backward, self._part):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._clock.to("pipeline")

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """The model across ranks reduces them, and nothing is scaled."""


def waiting_share(times: Sequence[tuple[float, float]]) -> float | None:
    """Of steps' times, waited and computed, but the first's, in which connections are opened: waited over both."""
    waited, computed = (sum(each) for each in zip((0.0, 0.0), *times[1:], strict=True))
    return waited / (waited + computed) if computed else None


class Pipeline:
    """This rank's stages. stages: by their number, in order. group: the ranks of the pipeline. tokens: of a row that
    this rank computes.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        model: StageModel,
        recipe: Recipe,
        options: CudaOptions,
        group: dist.ProcessGroup,
        tokens: int,
        device: torch.device,
        clock: PhaseClock,
    ) -> None:
        self._stages, self._options, self._group, self._device = stages, options, group, device
        self._micro = recipe.batch.accumulation_steps
        ids = torch.empty((recipe.batch.micro_batch_size, tokens), dtype=torch.int64, device="meta")
        self._shape = (*ids.shape, recipe.model.hidden_size)
        stream = torch.empty(self._shape, device="meta", requires_grad=True)
        of_objective = recipe.objective.measures
        self._returned = (1 + len(of_objective), 2) if of_objective else ()
        sums, count = torch.empty(self._returned, device="meta", requires_grad=True), stage_count(options)
        timed = [
            _TimedStage(
                *(model, part, clock, stage, number, count, device),
                input_args=ids if stage.first else stream,
                output_args=sums if stage.last else stream,
                group=group,
            )
            for part, (number, stage) in enumerate(stages.items())
        ]
        several = options.pipeline_schedule not in ("1f1b", "gpipe")
        self._schedule = schedule_class(options)(
            timed if several else timed[0], self._micro, loss_fn=lambda sums, _: loss_of(sums), scale_grads=False
        )
        self._clock = clock
        self._times: list[tuple[float, float]] = []  # of each timed step: ms waited, ms computed

    def step(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """All forward and backward passes. What the head returned for each micro-batch, over its divisor; zeros on a
        rank that has no head. A collective of the pipeline's ranks.
        """
        for stage in self._stages.values():
            stage.micro_batches, stage.returned = micro_batches, []
        has_first = any(stage.first for stage in self._stages.values())
        ids = (torch.cat([one.tokens.ids for one in micro_batches]),) if has_first else ()
        self._clock.to("pipeline")
        # a schedule asks for a target; the labels are in the micro-batches
        self._schedule.step(*ids, target=torch.zeros(self._micro), return_outputs=False)
        head = next((stage for stage in self._stages.values() if stage.last), None)
        zeros = torch.zeros(self._returned, device=self._device)
        returned = [zeros] * self._micro if head is None else head.returned
        for stage in self._stages.values():
            stage.micro_batches, stage.returned = (), []
        return returned

    def timed(self, phases: Mapping[str, float]) -> None:
        """Keep what a step's clock told, ms by part."""
        computed = phases["forward"] + phases["backward"]
        self._times.append((phases["pipeline"], computed))

    def bubble(self, world: World) -> dict[str, float]:
        """The part of the passes' time in which a rank waits: the mean over ranks, the largest, and what is predicted
        of equal stages; {} where no step was timed. A collective.
        """
        share = waiting_share(self._times)
        own = torch.tensor([-1.0 if share is None else share], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(world.size)]
        with world.together("compare the times of the pipeline's ranks"):
            dist.all_gather(found, own)
        shares = torch.cat(found)
        if float(shares.min()) < 0:
            return {}
        return {
            "pipeline_bubble_share": float(shares.mean()),
            "pipeline_bubble_max_share": float(shares.max()),
            "pipeline_bubble_predicted_share": bubble_share(self._options, self._micro),
        }

    def evaluate(self, micro_batch: MicroBatch) -> Tensor | None:
        """One forward pass without gradients; what the head returned, on the rank that has it. A collective of the
        pipeline's ranks: stage by stage, each rank sends the stream to the rank with the next one.
        """
        own, last, found = dist.get_rank(self._group), stage_count(self._options) - 1, None
        sent: list[tuple[dist.Work | None, Tensor]] = []
        for number, stage in self._stages.items():
            x = micro_batch.tokens.ids
            if not stage.first:
                x = torch.empty(self._shape, device=self._device) if found is None else found
                if (source := rank_of_stage(number - 1, self._options)) != own:
                    dist.recv(x, group=self._group, group_src=source)
            found = stage.evaluated(x, micro_batch)
            if number == last:
                continue
            if (target := rank_of_stage(number + 1, self._options)) != own:
                sent.append((dist.isend(found, group=self._group, group_dst=target), found))
                found = None
        for work, _ in sent:
            if work is not None:
                work.wait()
        return found if last in self._stages else None
