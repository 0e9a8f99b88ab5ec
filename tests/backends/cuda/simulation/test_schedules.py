"""Pipeline schedules: complete, free of circles, and as long as their papers say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch_schedules import passes

from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.pipeline_layout import stage_of_turn
from weftrain.backends.cuda.simulation.events import COMPUTE, Task, run
from weftrain.backends.cuda.simulation.schedules import Action, Schedule, orders
from weftrain.core.errors import BackendError

SECONDS = {"forward": 1.0, "backward": 2.0, "weights": 1.0}


def length(schedule: Schedule, stages: int, count: int, chunks: int = 1, seconds: dict[str, float] = SECONDS) -> float:
    """Of a pipeline whose every action takes `seconds` by kind / chunks, and sends nothing."""
    plans, ends, tasks = orders(schedule, stages, count, chunks), {}, []
    left = [list(plan) for plan in plans]
    while any(left):
        acted = False
        for device, plan in enumerate(left):
            while plan and all(need in ends for need in needs(schedule, device, plan[0], stages, chunks)):
                action = plan.pop(0)
                after = tuple(ends[need] for need in needs(schedule, device, action, stages, chunks))
                ends[action.kind, action.micro_batch, stage_of_turn(device, action.chunk, stages, schedule)] = len(
                    tasks
                )
                tasks.append(Task(device, COMPUTE, action.kind, seconds[action.kind] / chunks, after))
                acted = True
        assert acted, "the schedule's actions wait for one another"
    return max(span.end_s for span in run(tasks))


def needs(schedule: Schedule, device: int, action: Action, stages: int, chunks: int) -> list[tuple[str, int, int]]:
    stage = stage_of_turn(device, action.chunk, stages, schedule)
    if action.kind == "forward":
        return [("forward", action.micro_batch, stage - 1)] if stage else []
    if action.kind == "weights":
        return [("backward", action.micro_batch, stage)]
    last = stage == stages * chunks - 1
    own: list[tuple[str, int, int]] = [("forward", action.micro_batch, stage)]
    return own if last else [*own, ("backward", action.micro_batch, stage + 1)]


ALL: list[Any] = [
    ("1f1b", 1, 3, 1),
    ("1f1b", 4, 4, 1),
    ("gpipe", 3, 5, 1),
    ("interleaved_1f1b", 4, 8, 2),
    ("interleaved_1f1b", 2, 6, 5),
    ("interleaved_zero_bubble", 4, 8, 1),
    ("zbv", 4, 5, 2),
    ("zbv", 4, 9, 2),
    ("interleaved_zero_bubble", 2, 4, 3),
]


@pytest.mark.parametrize(("schedule", "stages", "count", "chunks"), ALL)
def test_each_micro_batch_passes_each_part_once_each_way(
    schedule: Schedule, stages: int, count: int, chunks: int
) -> None:
    kinds = ("forward", "backward", *(["weights"] if schedule in ("interleaved_zero_bubble", "zbv") else []))
    wanted = Counter(Action(kind, micro, chunk) for kind in kinds for micro in range(count) for chunk in range(chunks))
    for plan in orders(schedule, stages, count, chunks):
        assert Counter(plan) == wanted
    assert length(schedule, stages, count, chunks) >= count * sum(SECONDS[kind] for kind in kinds)


@pytest.mark.parametrize(
    ("schedule", "stages", "count", "chunks"),
    [*(case for case in ALL if case[1] > 1), ("interleaved_1f1b", 4, 6, 2), ("interleaved_zero_bubble", 4, 10, 2)],
)
def test_the_orders_are_those_of_torch(schedule: Schedule, stages: int, count: int, chunks: int) -> None:
    options = CudaOptions(
        parallel="ddp", pipeline_parallel=stages, pipeline_schedule=schedule, pipeline_virtual_stages=chunks
    )
    letter = {"forward": "F", "backward": "I" if "z" in schedule else "B", "weights": "W"}
    ours = orders(schedule, stages, count, chunks)
    assert passes(options, count) == {
        rank: [(letter[one.kind], stage_of_turn(rank, one.chunk, stages, schedule), one.micro_batch) for one in plan]
        for rank, plan in enumerate(ours)
    }


@pytest.mark.parametrize(("stages", "count"), [(4, 8), (2, 12)])
def test_the_v_shape_waits_not_longer_than_torch(stages: int, count: int) -> None:
    """A third of what 1F1B waits, halved by two parts a device, of passes that all take as long."""
    same = {"forward": 1.0, "backward": 1.0, "weights": 1.0}
    assert length("zbv", stages, count, 2, same) == pytest.approx(count * 3.0 + (stages - 1) / 2)


@pytest.mark.parametrize(("stages", "count"), [(2, 2), (4, 8), (4, 34), (8, 9)])
def test_the_bubble_of_1f1b(stages: int, count: int) -> None:
    """(p - 1) / (m + p - 1) of the step; GPipe waits as long."""
    whole = (count + stages - 1) * 3.0
    assert length("1f1b", stages, count) == pytest.approx(whole)
    assert length("gpipe", stages, count) == pytest.approx(whole)


@pytest.mark.parametrize(("stages", "count", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 8, 4)])
def test_interleaving_divides_the_bubble(stages: int, count: int, chunks: int) -> None:
    assert length("interleaved_1f1b", stages, count, chunks) == pytest.approx(count * 3.0 + (stages - 1) * 3.0 / chunks)


@pytest.mark.parametrize(("stages", "count"), [(2, 4), (4, 8), (4, 16)])
def test_zero_bubble_waits_a_third(stages: int, count: int) -> None:
    """ZB-H1: (p - 1) (F + B - W), with backward split into B and W: a third of 1F1B's where all three take as long."""
    same = {"forward": 1.0, "backward": 1.0, "weights": 1.0}
    assert length("interleaved_zero_bubble", stages, count, 1, same) == pytest.approx(count * 3.0 + (stages - 1) * 1.0)


@pytest.mark.parametrize(
    ("schedule", "stages", "count", "chunks", "message"),
    [
        ("1f1b", 4, 3, 1, "3 micro-batches are fewer than the 4 pipeline stages: make the micro-batches smaller"),
        ("1f1b", 4, 8, 2, "1f1b has one part of the model a device, not 2: use interleaved_1f1b"),
        ("interleaved_1f1b", 4, 9, 2, "in 2 equal rounds, not 9: make them a multiple of 4"),
        ("zbv", 4, 8, 1, "zbv has two parts of the model a device, not 1"),
    ],
)
def test_numbers_that_a_schedule_cannot_have(
    schedule: Schedule, stages: int, count: int, chunks: int, message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        orders(schedule, stages, count, chunks)
