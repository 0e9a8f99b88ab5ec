"""Discrete events: tasks on the streams of devices, each stream in the order of issue, each task after its needs.

Communication and computation of a device run at once, and the collectives' processors are missing to the computation
meanwhile: a computing task runs at the rate 1 - `slowdown` while a collective runs on its device.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from weftrain.core.errors import BackendError

COMPUTE, SHARD, REPLICATE = "compute", "shard", "replicate"  # streams; others are named after their groups
BETWEEN = ("tensor", "context", "expert")  # groups whose ranks exchange tokens in the middle of a layer
_SLOWING = frozenset({SHARD, REPLICATE, *BETWEEN})
NOTHING: Mapping[str, int] = {}
MOST_TASKS = 400_000  # about 5 s of one core


class Task(NamedTuple):
    """One piece of work. seconds: alone on its device. after: numbers of tasks that end before it begins; a device's
    stream besides runs its tasks one after another, in the order of their numbers.
    """

    device: int
    stream: str
    name: str
    seconds: float
    after: tuple[int, ...] = ()
    takes: Mapping[str, int] = NOTHING  # bytes by part, allocated when it begins
    frees: Mapping[str, int] = NOTHING  # bytes by part, freed when it ends


class Span(NamedTuple):
    start_s: float
    end_s: float


@dataclass
class _Device:
    """What runs on one device now."""

    running: dict[str, int] = field(default_factory=dict)  # stream -> task
    collectives: int = 0
    remaining_s: float = 0.0  # of the computing task, at full rate, at the time `since_s`
    since_s: float = 0.0
    version: int = 0  # of the computing task's planned end: a later one replaces it


def run(tasks: Sequence[Task], slowdown: float = 0.0) -> list[Span]:
    """When each task runs. slowdown: the share of its rate that computation loses beside a collective, of [0, 1).
    Raises BackendError for tasks that wait for one another in a circle, or too many.
    """
    if len(tasks) > MOST_TASKS:
        raise BackendError(
            f"the simulated step has {len(tasks):,} tasks, and {MOST_TASKS:,} are the most: simulate fewer "
            "micro-batches or layers"
        )
    return _Run(tasks, 1.0 - slowdown).spans()


class _Run:
    """One simulation."""

    def __init__(self, tasks: Sequence[Task], rate: float) -> None:
        self.tasks, self.rate, self.now_s = tasks, rate, 0.0
        self.devices = {device: _Device() for device in {task.device for task in tasks}}
        self.waiting = [len(task.after) for task in tasks]
        self.followers: list[list[int]] = [[] for _ in tasks]
        self.queues: dict[tuple[int, str], list[int]] = {}
        for number, task in enumerate(tasks):
            for earlier in task.after:
                self.followers[earlier].append(number)
            self.queues.setdefault((task.device, task.stream), []).append(number)
        self.heads = dict.fromkeys(self.queues, 0)
        self.starts, self.ends = [-1.0] * len(tasks), [-1.0] * len(tasks)
        self.events: list[tuple[float, int, int]] = []  # end, task, version

    def spans(self) -> list[Span]:
        for queue in self.queues:
            self._start_next(queue)
        while self.events:
            end, number, version = heapq.heappop(self.events)
            task = self.tasks[number]
            device = self.devices[task.device]
            if task.stream == COMPUTE and version != device.version:
                continue  # its end was moved
            self.now_s = end
            self._finish(number, task, device)
        if any(end < 0 for end in self.ends):
            stuck = next(task for task, end in zip(self.tasks, self.ends, strict=True) if end < 0)
            raise BackendError(f"the simulated step stands still: {stuck.name} of device {stuck.device} never begins")
        return [Span(start, end) for start, end in zip(self.starts, self.ends, strict=True)]

    def _start_next(self, queue: tuple[int, str]) -> None:
        """Start the next task of a stream if nothing runs there and it waits for nothing."""
        numbers, head = self.queues[queue], self.heads[queue]
        device, stream = self.devices[queue[0]], queue[1]
        if head == len(numbers) or stream in device.running or self.waiting[numbers[head]]:
            return
        number = numbers[head]
        self.heads[queue] += 1
        self.starts[number] = self.now_s
        device.running[stream] = number
        seconds = self.tasks[number].seconds
        if stream == COMPUTE:
            device.remaining_s, device.since_s = seconds, self.now_s
            self._plan_end(number, device)
        else:
            heapq.heappush(self.events, (self.now_s + seconds, number, 0))
            if stream in _SLOWING:
                self._count_collectives(device, 1)

    def _finish(self, number: int, task: Task, device: _Device) -> None:
        self.ends[number] = self.now_s
        del device.running[task.stream]
        if task.stream in _SLOWING:
            self._count_collectives(device, -1)
        self._start_next((task.device, task.stream))
        for later in self.followers[number]:
            self.waiting[later] -= 1
            if not self.waiting[later]:
                self._start_next((self.tasks[later].device, self.tasks[later].stream))

    def _count_collectives(self, device: _Device, change: int) -> None:
        """A collective began or ended: the computing task's rate may change."""
        before = device.collectives
        number = device.running.get(COMPUTE)
        if number is not None and self.rate < 1.0 and (before == 0 or before + change == 0):
            rate = self.rate if before else 1.0
            device.remaining_s = max(0.0, device.remaining_s - (self.now_s - device.since_s) * rate)
            device.since_s = self.now_s
        else:
            number = None
        device.collectives = before + change
        if number is not None:
            self._plan_end(number, device)

    def _plan_end(self, number: int, device: _Device) -> None:
        rate = self.rate if device.collectives else 1.0
        device.version += 1
        heapq.heappush(self.events, (self.now_s + device.remaining_s / rate, number, device.version))
