"""Pipeline schedules: which micro-batch each stage works on, in which order.

A device holds `chunks` parts of the model, every `stages`-th one; part c of device s is stage c x stages + s of the
model. Sources: 1F1B and interleaving as of Megatron-LM (arXiv 2104.04473), the split of the backward into gradients of
inputs and of weights as of zero bubble's first schedule (ZB-H1, arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from weftrain.core.errors import BackendError

Schedule = Literal["1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble"]


class Action(NamedTuple):
    """forward; backward, which is the whole of it but under zero bubble, where weights is a pass of its own."""

    kind: Literal["forward", "backward", "weights"]
    micro_batch: int
    chunk: int


def orders(schedule: Schedule, stages: int, micro_batches: int, chunks: int = 1) -> list[list[Action]]:
    """Of each device, its actions in order. Raises BackendError for numbers that the schedule cannot have."""
    if stages > 1 and micro_batches < stages:
        raise BackendError(
            f"{micro_batches} micro-batches are fewer than the {stages} pipeline stages: make the micro-batches "
            "smaller, or use fewer stages"
        )
    if chunks > 1 and schedule in ("1f1b", "gpipe"):
        raise BackendError(
            f"schedule {schedule} has one part of the model a device, not {chunks}: use interleaved_1f1b"
        )
    if chunks > 1 and micro_batches % stages:
        raise BackendError(
            f"schedule {schedule} needs micro-batches in multiples of the {stages} pipeline stages, not "
            f"{micro_batches}: change batch.micro_batch_size or batch.replicas, or use 1f1b"
        )
    if schedule == "gpipe":
        return [_gpipe(micro_batches)] * stages
    in_turn = [list(_in_turn(stage, stages, micro_batches, chunks)) for stage in range(stages)]
    if schedule == "interleaved_zero_bubble":
        return [list(_weights_late(actions, stage * chunks)) for stage, actions in enumerate(in_turn)]
    return in_turn


def _gpipe(count: int) -> list[Action]:
    kinds: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    return [Action(kind, micro, 0) for kind in kinds for micro in range(count)]


def _in_turn(stage: int, stages: int, count: int, chunks: int) -> Iterator[Action]:
    """Forwards and backwards in turn, after the forwards that the last stage has to wait for. Groups of `stages`
    micro-batches pass through a device's parts one after another.
    """
    total = count * chunks

    def place(number: int, backward: bool) -> tuple[int, int]:
        group, within = divmod(number, stages * chunks)
        chunk, micro = divmod(within, stages)
        return group * stages + micro, chunks - 1 - chunk if backward else chunk

    ahead = stages - 1 - stage if chunks == 1 else 2 * (stages - 1 - stage) + (chunks - 1) * stages
    ahead = min(total, ahead)
    for number in range(ahead):
        yield Action("forward", *place(number, False))
    for number in range(total):
        if number + ahead < total:
            yield Action("forward", *place(number + ahead, False))
        yield Action("backward", *place(number, True))


def _weights_late(actions: list[Action], late: int) -> Iterator[Action]:
    """Gradients of weights come `late` backwards behind those of inputs, and so fill the wait at the end."""
    waiting: list[Action] = []
    for action in actions:
        yield action
        if action.kind == "backward":
            waiting.append(action._replace(kind="weights"))
            if len(waiting) > late:
                yield waiting.pop(0)
    yield from waiting
