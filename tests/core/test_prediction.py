"""Whether a run fits the memory that it was predicted for."""

from __future__ import annotations

import pytest

from weftrain.core.prediction import Needs, Prediction


@pytest.mark.parametrize(("capacity", "fits"), [(None, None), (7, True), (6.5, False)])
def test_a_run_fits_if_the_sum_of_its_parts_does(capacity: float | None, fits: bool | None) -> None:
    needs = Needs({"weights": 4, "activations": 3}, disk_bytes=100)
    assert needs.total_memory_bytes == 7
    assert Prediction(1.0, "matmul", {"matmul": 1.0}, needs, capacity_bytes=capacity).fits is fits
