"""The cost of a checkpoint is measured on whole saves, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

from weftrain.analysis.bench.save_cost import rounds_of


def test_rounds(tmp_path: Path) -> None:
    found = list(rounds_of(tmp_path, mib=32, rounds=2))
    assert len(found) == 2
    assert all(seconds > 0 for one in found for seconds in one)
    assert list(tmp_path.iterdir()) == []
