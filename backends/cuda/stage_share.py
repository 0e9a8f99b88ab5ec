"""What one rank of a pipeline holds, for the planner; without a pipeline, the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from weftrain.backends.common.device_memory import Sizes
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.pipeline_layout import (
    in_flight,
    layers_of_stages,
    parameters_of_stage,
    put_off,
    stage_count,
    stages_of_rank,
)
from weftrain.core.config import Recipe


@dataclass(frozen=True)
class StageShare:
    """rank: of the pipeline. layers: of all its stages; in_a_pass: of the largest one. kept_layers: of which
    activations are kept at one time, a layer once for each micro-batch. kept_streams: residual streams that are kept
    besides: what a stage gives to the next one, for each micro-batch, and what the head reads; less what a stage
    receives, which its first layer keeps in one of the buffers. streams: residual streams of a micro-batch for which
    the schedule holds buffers, of what is received and of what comes back. put_off: backward passes
    whose gradients of weights are put off. names: of its parameters; None: of all.
    """

    rank: int
    layers: int
    in_a_pass: int
    kept_layers: int
    kept_streams: int
    streams: int
    put_off: int
    embedding: bool
    head: bool
    names: frozenset[str] | None

    def sizes(self, recipe: Recipe, plane: str = "weights") -> Sizes:
        return Sizes.of(recipe, plane, self.names)


def shares_of(recipe: Recipe, options: CudaOptions) -> list[StageShare]:
    """Of each rank of the pipeline."""
    count = recipe.model.num_layers
    if options.pipeline_parallel == 1:
        return [StageShare(0, count, count, count, 1, 0, 0, True, True, None)]
    layers, last, found = layers_of_stages(recipe, options), stage_count(options) - 1, []
    micro_batches = max(recipe.batch.accumulation_steps, options.pipeline_parallel)  # fewer are refused
    for rank in range(options.pipeline_parallel):
        stages = stages_of_rank(rank, options)
        passes = in_flight(options, rank, micro_batches)
        kept = sum(len(layers[stage]) * times for stage, times in zip(stages, passes, strict=True))
        # between two stages of one rank a stream is given on in the buffer itself
        given = [stage < last and stage + 1 not in stages for stage in stages]
        received = [stage > 0 for stage in stages]
        streams = sum((a - b) * times for a, b, times in zip(given, received, passes, strict=True))
        borders = sum((stage > 0) + (stage < last) for stage in stages)
        names = frozenset(name for stage in stages for name in parameters_of_stage(stage, recipe, options))
        own = [len(layers[stage]) for stage in stages]
        put = put_off(options, rank, micro_batches)
        holds = sum(own), max(own), kept, streams + (last in stages), borders * micro_batches, put
        found.append(StageShare(rank, *holds, 0 in stages, last in stages, names))
    return found
