"""What a run waited for its saves is told from the lines that it logged."""

from __future__ import annotations

from typing import Any

import pytest

from weftrain.analysis.bench.remote_save import waits


def test_waits_and_slower_steps_are_told_apart() -> None:
    """A save after each 5 steps of 100 ms, for which 2 s are waited, and under which the next two steps take 400 ms."""
    now, records = 0.0, list[dict[str, Any]]()
    for step in range(1, 15):
        step_s = 0.4 if step in (6, 7) else 0.1
        now += step_s + 0.01 + (2.0 if step in (6, 11) else 0.0)
        records.append({"kind": "step", "step": step, "time": now, "step_ms": step_s * 1e3})
    found = waits(records, every=5, cpu_s=1.0)
    assert found.waited_s == pytest.approx((2.0, 2.0))
    assert found.slowed_s == pytest.approx(0.6)
    assert found.all_s == pytest.approx(4.6)
