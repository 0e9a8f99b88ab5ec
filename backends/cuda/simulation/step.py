"""A simulated step: its tasks, when each runs, where the time of each device goes, and what it holds in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weftrain.backends.cuda.simulation.chain import Chain
from weftrain.backends.cuda.simulation.events import BETWEEN, COMPUTE, REPLICATE, SHARD, Span, Task, run
from weftrain.backends.cuda.simulation.layout import Layout
from weftrain.backends.cuda.simulation.rates import Rates
from weftrain.backends.cuda.simulation.schedules import Action, orders
from weftrain.backends.cuda.simulation.tasks import Tasks
from weftrain.backends.cuda.simulation.work import Program
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError

MOST_SIMULATED = 30_000  # tasks: of a step with more, some micro-batches are simulated, and the rest take as long
SLOWED = "beside collectives"
_WEIGHTS = "weights and gradients"
WAITS = (*(f"{group} ranks" for group in BETWEEN), _WEIGHTS, "pipeline")


class StepTasks(Tasks):
    """The tasks of a step with so many micro-batches."""

    def __init__(self, recipe: Recipe, layout: Layout, program: Program, rates: Rates, micro_batches: int) -> None:
        super().__init__(recipe, layout, program, rates, micro_batches)
        plans = orders(layout.schedule, layout.pipeline, micro_batches, layout.chunks)
        self.chains = [Chain(self, number, plan) for number, plan in enumerate(plans)]
        self._build(plans)

    def _build(self, plans: Sequence[list[Action]]) -> None:
        """All devices' actions, each after those whose results it reads."""
        left = [list(reversed(plan)) for plan in plans]
        while any(left):
            acted = False
            for chain, actions in zip(self.chains, left, strict=True):
                while actions and all(need in self.ends for need in self.needed(chain.number, actions[-1])):
                    chain.act(actions.pop())
                    acted = True
            if not acted:
                raise BackendError(f"schedule {self.layout.schedule}: its actions wait for one another")
        for chain in self.chains:
            chain.finish()


@dataclass(frozen=True)
class Memory:
    """Of one device: bytes over time, and by part when they are most."""

    curve: tuple[tuple[float, int], ...]  # (seconds, bytes from then on)
    peak: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


@dataclass(frozen=True)
class Simulated:
    """A step. Times of `devices` add up to step_s: computation by kind, what it loses beside collectives, and waits.
    tasks and spans are those of `simulated_micro_batches`.
    """

    step_s: float
    micro_batches: int
    simulated_micro_batches: int
    layout: Layout
    program: Program
    rates: Rates
    tasks: Sequence[Task]
    spans: Sequence[Span]
    devices: Sequence[Mapping[str, float]]  # of each pipeline stage, seconds by what they go to
    links: Sequence[Mapping[str, float]]  # of each, seconds that its collectives take, by stream
    memory: Sequence[Memory]

    @property
    def bubble(self) -> float:
        """The share of the step in which devices wait for other stages, on average."""
        return sum(times["pipeline"] for times in self.devices) / len(self.devices) / self.step_s


def simulate(recipe: Recipe, layout: Layout, program: Program, rates: Rates) -> Simulated:
    """Raises BackendError for numbers that the layout cannot have."""
    count = layout.micro_batches(recipe)
    stride = layout.pipeline if layout.schedule.startswith("interleaved") else 1  # micro-batches of a round
    least = 2 * (layout.pipeline + stride)  # after which each further one adds as much
    each = len(StepTasks(recipe, layout, program, rates, layout.pipeline).tasks) / layout.pipeline
    some = max(least, int(MOST_SIMULATED / each)) // stride * stride
    if count <= some + stride:
        return _simulated(StepTasks(recipe, layout, program, rates, count), count)
    fewer = _simulated(StepTasks(recipe, layout, program, rates, some - stride), count)
    more = _simulated(StepTasks(recipe, layout, program, rates, some), count)
    return _continued(fewer, more, (count - some) / stride)


def _continued(fewer: Simulated, more: Simulated, times: float) -> Simulated:
    """`more`, were the difference between the two repeated so many times."""

    def after(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
        return {name: second[name] + times * (second[name] - first.get(name, 0.0)) for name in second}

    return Simulated(
        more.step_s + times * (more.step_s - fewer.step_s),
        more.micro_batches,
        more.simulated_micro_batches,
        more.layout,
        more.program,
        more.rates,
        more.tasks,
        more.spans,
        [after(*pair) for pair in zip(fewer.devices, more.devices, strict=True)],
        [after(*pair) for pair in zip(fewer.links, more.links, strict=True)],
        more.memory,
    )


def _simulated(step: StepTasks, micro_batches: int) -> Simulated:
    spans = run(step.tasks, step.rates.slowdown)
    step_s = max(span.end_s for span in spans)
    mine: list[list[int]] = [[] for _ in step.chains]  # of each device, its tasks
    for number, task in enumerate(step.tasks):
        mine[task.device].append(number)
    devices = [_times(step, spans, numbers, step_s) for numbers in mine]
    memory = [_memory(step, spans, chain, mine[chain.number]) for chain in step.chains]
    links = [_links(step, numbers) for numbers in mine]
    return Simulated(
        step_s,
        micro_batches,
        step.micro_batches,
        step.layout,
        step.program,
        step.rates,
        step.tasks,
        spans,
        devices,
        links,
        memory,
    )


def _links(step: StepTasks, numbers: Sequence[int]) -> dict[str, float]:
    found: dict[str, float] = {}
    for task in (step.tasks[number] for number in numbers):
        if task.stream != COMPUTE:
            found[task.stream] = found.get(task.stream, 0.0) + task.seconds
    return found


def _times(step: StepTasks, spans: Sequence[Span], numbers: Sequence[int], step_s: float) -> dict[str, float]:
    """Where a device's step goes. While it computes nothing, it waits for what runs on its links, or for a stage."""
    times: dict[str, float] = {}
    busy, alone = 0.0, 0.0
    running: dict[str, list[Span]] = {stream: [] for stream in (*BETWEEN, SHARD, REPLICATE)}
    computing: list[Span] = []
    for number in numbers:
        task, span, kinds = step.tasks[number], spans[number], step.kinds[number]
        if task.stream == COMPUTE:
            computing.append(span)
            busy, alone = busy + span.end_s - span.start_s, alone + task.seconds
            for kind, seconds in kinds.items():
                times[kind] = times.get(kind, 0.0) + seconds
        elif task.stream in running:
            running[task.stream].append(span)
    times[SLOWED] = busy - alone
    idle = _gaps(sorted(computing), step_s)
    for stream, spans_there in running.items():
        name = f"{stream} ranks" if stream in BETWEEN else _WEIGHTS
        waited, idle = _covered(idle, sorted(spans_there))
        times[name] = times.get(name, 0.0) + waited
    times["pipeline"] = math.fsum(end - start for start, end in idle)
    return times


def _gaps(spans: Sequence[Span], until_s: float) -> list[tuple[float, float]]:
    """Between spans that do not overlap, from 0 to until_s."""
    found, at = [], 0.0
    for span in spans:
        if span.start_s > at:
            found.append((at, span.start_s))
        at = max(at, span.end_s)
    return [*found, (at, until_s)] if until_s > at else found


def _covered(gaps: Sequence[tuple[float, float]], spans: Sequence[Span]) -> tuple[float, list[tuple[float, float]]]:
    """How much of the gaps lies under the spans, and the gaps that are left; both are sorted."""
    covered, left, first = 0.0, [], 0
    for start, end in gaps:
        while first < len(spans) and spans[first].end_s <= start:
            first += 1
        number = first
        while number < len(spans) and spans[number].start_s < end:
            span = spans[number]
            if span.start_s > start:
                left.append((start, span.start_s))
            covered += max(0.0, min(end, span.end_s) - max(start, span.start_s))
            start = max(start, min(end, span.end_s))
            number += 1
        if start < end:
            left.append((start, end))
    return covered, left


def _memory(step: StepTasks, spans: Sequence[Span], chain: Chain, numbers: Sequence[int]) -> Memory:
    """What is freed at a time is free for what begins then."""
    changes: list[tuple[float, int, str, int]] = []
    for number in numbers:
        task, span = step.tasks[number], spans[number]
        changes += [(span.start_s, 1, part, size) for part, size in task.takes.items()]
        changes += [(span.end_s, 0, part, -size) for part, size in task.frees.items()]
    held = dict(chain.held)
    total = most = sum(held.values())
    curve, peak = [(0.0, total)], dict(held)
    for at, _, part, size in sorted(changes):
        held[part] = held.get(part, 0) + size
        total += size
        if curve[-1][0] == at:
            curve[-1] = (at, total)
        else:
            curve.append((at, total))
        if total > most:
            most, peak = total, dict(held)
    return Memory(tuple(curve), {part: size for part, size in peak.items() if size})
