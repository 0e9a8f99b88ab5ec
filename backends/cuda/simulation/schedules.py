"""Pipeline schedules: which micro-batch each stage works on, in which order.

A device holds `chunks` parts of the model; `Layout.stages` says which. Sources: 1F1B and interleaving as of Megatron-LM
(arXiv 2104.04473), the split of the backward into gradients of inputs and of weights and the V-shaped schedule as of
arXiv 2401.10241. The orders are those of torch's schedules, which the cuda backend runs
(tests/backends/cuda/simulation/test_schedules.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple, cast

from weftrain.core.errors import BackendError

Schedule = Literal["1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"]
Kind = Literal["forward", "backward", "weights"]


class Action(NamedTuple):
    """forward; backward, which is the whole of it but under zero bubble, where weights is a pass of its own."""

    kind: Kind
    micro_batch: int
    chunk: int


def orders(schedule: Schedule, stages: int, micro_batches: int, chunks: int = 1) -> list[list[Action]]:
    """Of each device, its actions in order. Raises BackendError for numbers that the schedule cannot have."""
    if stages > 1 and micro_batches < stages:
        raise BackendError(
            f"{micro_batches} micro-batches are fewer than the {stages} pipeline stages: make the micro-batches "
            "smaller, or use fewer stages"
        )
    if (chunks > 1 and schedule in ("1f1b", "gpipe")) or (chunks != 2 and schedule == "zbv"):
        wanted = "two parts" if schedule == "zbv" else "one part"
        raise BackendError(
            f"schedule {schedule} has {wanted} of the model a device, not {chunks}: use interleaved_1f1b"
        )
    rounds = max(1, micro_batches // stages)
    if schedule.startswith("interleaved") and micro_batches % rounds:
        raise BackendError(
            f"schedule {schedule} takes micro-batches in {rounds} equal rounds, not {micro_batches}: make them a "
            f"multiple of {stages} by batch.micro_batch_size or batch.replicas, or use 1f1b"
        )
    if schedule == "gpipe":
        return [_gpipe(micro_batches)] * stages
    if schedule == "zbv":
        return [_v_shaped(stage, stages, micro_batches) for stage in range(stages)]
    # forwards that a stage does for each one behind it before its first backward
    hop = 2 if schedule == "interleaved_1f1b" else 1
    ahead = [hop * (stages - 1 - stage) + (chunks - 1) * micro_batches // rounds for stage in range(stages)]
    in_turn = [list(_in_turn(each, micro_batches, micro_batches // rounds, chunks)) for each in ahead]
    if schedule == "interleaved_zero_bubble":
        return [list(_weights_late(actions, stage)) for stage, actions in enumerate(in_turn)]
    return in_turn


def _gpipe(count: int) -> list[Action]:
    kinds: tuple[Kind, ...] = ("forward", "backward")
    return [Action(kind, micro, 0) for kind in kinds for micro in range(count)]


def _in_turn(ahead: int, count: int, of_a_round: int, chunks: int) -> Iterator[Action]:
    """Forwards and backwards in turn, after `ahead` forwards that the last stage has to wait for. The micro-batches of
    a round pass through a device's parts one after another.
    """

    def place(number: int, backward: bool) -> tuple[int, int]:
        before, within = divmod(number, of_a_round * chunks)
        chunk, micro = divmod(within, of_a_round)
        return before * of_a_round + micro, chunks - 1 - chunk if backward else chunk

    total = count * chunks
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


def _v_shaped(stage: int, stages: int, count: int) -> list[Action]:
    """The stages go down the devices and back up, so that the first device has the first and the last one. Written for
    2 x stages - 1 micro-batches or more; of fewer, the others are left out.
    """
    most, behind = max(2 * stages - 1, count), stages - stage  # devices from this one to the last
    forward, last_forward = ("forward", 0), ("forward", 1)
    back, last_back = [("backward", 0), ("weights", 0)], [("backward", 1), ("weights", 1)]
    steps = [forward] * (2 * behind - 1) + [last_forward, forward] * stage + [last_forward, *last_back] * behind
    for begun in range(stages + behind - 1, stages + behind - 1 + most - stages):
        steps += [forward] * (begun < most) + back + [last_forward, *last_back]
    steps += [back[0], last_back[0]] * stage + back * behind + [last_back[1]] * stage + [back[1]] * stage
    made: Counter[tuple[str, int]] = Counter()
    plan = []
    for kind, chunk in steps:
        plan.append(Action(cast(Kind, kind), made[kind, chunk], chunk))
        made[kind, chunk] += 1
    return [action for action in plan if action.micro_batch < count]
