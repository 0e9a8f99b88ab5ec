"""The plot of a comparison."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from compare_cases import series

from weftrain.analysis.compare.plot import plot
from weftrain.analysis.compare.series import (
    MeasureColumn,
    heldout_column,
)
from weftrain.analysis.compare.table import compare


def test_the_picture_has_no_empty_panel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import struct

    def size(path: Path) -> tuple[int, ...]:
        return struct.unpack(">II", path.read_bytes()[16:24])

    held, task = (
        heldout_column("words", "1" * 64, 52, False),
        MeasureColumn("score", "arc", "acc, %", (("shots", "5"),)),
    )
    assert plot(compare([series("a", {1: {held: 2.0}, 2: {held: 1.0}})]), tmp_path / "one.png")
    assert plot(compare([series("a", {1: {held: 2.0, task: 40.0}})]), tmp_path / "two.png")
    assert (size(tmp_path / "one.png"), size(tmp_path / "two.png")) == ((1800, 600), (1800, 1200))
    assert not plot(compare([series("a", {1: {held: math.inf}, 2: {}})]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
