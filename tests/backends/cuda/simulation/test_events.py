"""The event engine: order, waits, and computation that is slower beside collectives."""

from __future__ import annotations

import random

import pytest

from weftrain.backends.cuda.simulation.events import COMPUTE, MOST_TASKS, SHARD, Span, Task, run
from weftrain.core.errors import BackendError


def test_a_stream_runs_in_order_and_a_task_after_those_it_waits_for() -> None:
    tasks = [
        Task(0, COMPUTE, "a", 2.0),
        Task(0, SHARD, "b", 5.0, (0,)),
        Task(0, COMPUTE, "c", 1.0),
        Task(0, COMPUTE, "d", 1.0, (1,)),
        Task(1, COMPUTE, "e", 1.0, (2,)),
    ]
    assert run(tasks) == [Span(0, 2), Span(2, 7), Span(2, 3), Span(7, 8), Span(3, 4)]


def test_computation_beside_a_collective_is_slower_by_hand() -> None:
    """A quarter of the processors is missing for 4 s: 3 s of work are done then, and 1 s is left. A send takes none."""
    tasks = [Task(0, SHARD, "gather", 4.0), Task(0, COMPUTE, "work", 4.0), Task(0, "send to 1", "send", 100.0)]
    assert run(tasks, 0.25)[1] == Span(0, 5)
    # the collective begins in the middle of the work, and ends after it
    tasks = [Task(0, COMPUTE, "first", 1.0), Task(0, COMPUTE, "work", 4.0), Task(1, COMPUTE, "other", 3.0)]
    tasks.append(Task(0, SHARD, "gather", 100.0, (2,)))
    assert run(tasks, 0.5)[1] == Span(1, 7)
    assert run(tasks, 0.0)[1] == Span(1, 5)


def test_two_collectives_slow_no_more_than_one() -> None:
    tasks = [Task(0, SHARD, "a", 2.0), Task(0, "replicate", "b", 4.0), Task(0, COMPUTE, "work", 4.0)]
    assert run(tasks, 0.5)[2] == Span(0, 6)


@pytest.mark.parametrize("seed", range(5))
def test_random_tasks_keep_the_rules(seed: int) -> None:
    """No stream runs two tasks at once, nothing begins before its needs end, and no task is shorter than alone."""
    rng = random.Random(seed)
    tasks: list[Task] = []
    for number in range(200):
        after = tuple(sorted(rng.sample(range(number), min(number, rng.randrange(3)))))
        stream = rng.choice([COMPUTE, SHARD, "replicate"])
        tasks.append(Task(rng.randrange(3), stream, str(number), rng.choice([0.0, rng.random()]), after))
    spans = run(tasks, 0.2)
    at: dict[tuple[int, str], float] = {}
    for task, span in zip(tasks, spans, strict=True):
        assert span.start_s >= at.get((task.device, task.stream), 0.0) - 1e-12
        assert all(span.start_s >= spans[need].end_s - 1e-12 for need in task.after)
        least, most = task.seconds, task.seconds / (0.8 if task.stream == COMPUTE else 1.0)
        assert least - 1e-9 <= span.end_s - span.start_s <= most + 1e-9
        at[task.device, task.stream] = span.end_s


def test_what_cannot_run_is_refused() -> None:
    circle = [Task(0, COMPUTE, "a", 1.0, (1,)), Task(0, SHARD, "b", 1.0, (0,))]
    with pytest.raises(BackendError, match="stands still: a of device 0 never begins"):
        run(circle)
    with pytest.raises(BackendError, match="400,001 tasks, and 400,000 are the most"):
        run([Task(0, COMPUTE, "a", 0.0)] * (MOST_TASKS + 1))
