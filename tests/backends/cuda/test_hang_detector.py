"""A signal to stop that reaches any one rank is known to rank 0, which alone decides when the run stops."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from weftrain.backends.cuda.hang_detector import HangDetector
from weftrain.backends.cuda.world import World
from weftrain.core.stop import StopRequest


class OneStore(World):
    """A rank of a world whose store lies in this process."""

    def own_store(self) -> dist.Store:
        return self.store


def test_a_signal_at_any_rank_reaches_rank_0() -> None:
    store = dist.HashStore()
    worlds = [OneStore(torch.device("cpu"), store, rank, 3, 1.0, StopRequest()) for rank in range(3)]
    detectors = [HangDetector(world) for world in worlds]
    for detector in detectors:
        detector.close()
    for detector in detectors:
        detector.pass_on_stop()
    assert not any(world.stop.requested() for world in worlds)
    worlds[2].stop.ask(signal.SIGTERM)
    for detector in (detectors[2], detectors[1], detectors[0]):
        detector.pass_on_stop()
    # Rank 1 goes on: it stops when rank 0 commands no more steps, so that all stop after the same one.
    assert [world.stop.number for world in worlds] == [signal.SIGTERM, 0, signal.SIGTERM]


def test_a_request_to_save_at_any_rank_reaches_rank_0_once() -> None:
    store = dist.HashStore()
    worlds = [OneStore(torch.device("cpu"), store, rank, 3, 1.0, StopRequest()) for rank in range(3)]
    detectors = [HangDetector(world) for world in worlds]
    for detector in detectors:
        detector.close()
    for asked in (1, 2):
        worlds[2].stop.ask_save()
        for _ in range(2):
            for detector in reversed(detectors):
                detector.pass_on_stop()
        assert worlds[0].stop.saves == asked
        assert (worlds[0].stop.take_save(), worlds[0].stop.take_save()) == (True, False)
    assert not any(world.stop.requested() for world in worlds)
