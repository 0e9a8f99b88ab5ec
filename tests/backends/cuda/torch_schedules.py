"""The orders of torch's pipeline schedules, for tests of what is predicted of them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.pipeline import schedule_class
from weftrain.backends.cuda.pipeline_layout import stage_count, stages_of_rank


def passes(options: CudaOptions, micro_batches: int) -> dict[int, list[tuple[str, int, int]]]:
    """What each rank computes, in order: F, B, I or W, stage, micro-batch. 1F1B's is written here: what torch gives of
    it for its own drawings begins with the wrong micro-batch on all ranks but the first.
    """
    ranks = options.pipeline_parallel
    if options.pipeline_schedule == "1f1b":
        found = {}
        for rank in range(ranks):
            warm = min(micro_batches, ranks - rank)
            order = [("F", rank, at) for at in range(warm)]
            for at in range(micro_batches):
                order.append(("B", rank, at))
                order += [("F", rank, at + warm)] * (at + warm < micro_batches)
            found[rank] = order
        return found
    count = stage_count(options)
    stages = [
        SimpleNamespace(group_size=ranks, group_rank=0, num_stages=count, stage_index=stage, submod=torch.nn.Identity())
        for stage in stages_of_rank(0, options)
    ]
    several = options.pipeline_schedule != "gpipe"
    schedule = schedule_class(options)(
        stages if several else stages[0], micro_batches, loss_fn=lambda output, _: output
    )
    letters = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    return {
        rank: [
            (letters[action.computation_type.name], action.stage_index, action.microbatch_index)
            for action in actions
            if action is not None and action.computation_type.name in letters
        ]
        for rank, actions in schedule.pipeline_order.items()
    }
