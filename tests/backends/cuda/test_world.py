"""A world of one rank needs no collective, and an error that a rank leaves is the one that is reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from weftrain.backends.cuda.world import World
from weftrain.core.errors import EverywhereError
from weftrain.core.stop import StopRequest


def world(size: int) -> World:
    return World(torch.device("cpu"), dist.HashStore(), 0, size, 1.0, StopRequest())


def test_one_rank_agrees_with_itself() -> None:
    one, rows = world(1), np.arange(3)
    one.command(do="nothing")
    one.same_everywhere({"torch": "2"})
    assert (one.total(7), one.broadcast_array(rows) is rows, one.next_run(), one.next_run()) == (7, True, 1, 2)
    with pytest.raises(EverywhereError, match=r"^too little memory$"):
        one.agree("too little memory")


def test_the_reason_of_the_rank_that_failed_is_reported() -> None:
    several = world(3)
    several.report_failure("disk full")
    with (
        pytest.raises(EverywhereError, match=r"while this one tried to add .*disk full; connection closed"),
        several.together("add"),
    ):
        raise RuntimeError("connection closed")
    several.command(do="step")  # nothing is sent to a world that has failed


def test_memory_that_this_rank_lacks_is_not_taken_for_another_rank_that_failed() -> None:
    world = World(torch.device("cpu"), dist.HashStore(), 0, 2, 1.0, StopRequest())
    error = RuntimeError("CUDA error: out of memory")
    with pytest.raises(RuntimeError) as raised, world.together("compute step 3"):
        raise error
    assert raised.value is error
