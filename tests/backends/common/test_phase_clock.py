"""The parts of a step add up to the time between the first mark and the stop."""

from __future__ import annotations

import pytest
import torch

from weftrain.backends.common import phase_clock
from weftrain.backends.common.phase_clock import PhaseClock


def test_a_part_that_comes_twice_has_the_sum_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: next(moments))
    clock = PhaseClock(torch.device("cpu"), on=True)
    for part in ("forward", "backward", "forward"):
        clock.to(part)
    assert clock.stop() == {"forward": 5000.0, "backward": 2000.0}


def test_off_it_measures_nothing() -> None:
    clock = PhaseClock(torch.device("cpu"), on=False)
    clock.to("forward")
    assert clock.stop() is None
