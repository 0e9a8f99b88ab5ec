"""How the order stages are cut: memory of a bucket and the number of file opens stay bounded, whatever is counted."""

from __future__ import annotations

import pytest

from weftrain.data_prep.stages.plan import Limits
from weftrain.data_prep.stages.survey import arrangement

LIMITS = Limits(64 << 20, 1 << 18, (4 << 20, 64 << 20), 1 << 20)
TERABYTE = 10**12


@pytest.mark.parametrize("num_bytes", [0, 1, 10**7, 10**9, 10**11, TERABYTE, 30 * TERABYTE])
def test_buckets_and_runs_are_bounded(num_bytes: int) -> None:
    pieces = max(1, num_bytes // (32 << 20))
    found = arrangement(LIMITS, pieces, num_bytes, as_read=False)
    buckets, runs = found["buckets"], found["runs"]
    assert buckets & (buckets - 1) == 0
    assert num_bytes / buckets <= 64 << 20
    if not runs:
        assert pieces * buckets <= 1 << 20
        return
    slices = found["run_slices"]
    assert runs * found["run_pieces"] >= pieces > (runs - 1) * found["run_pieces"]
    assert buckets % slices == 0
    assert num_bytes / runs / slices <= 64 << 20
    assert pieces * slices + runs * buckets <= 4 * pieces**1.5


def test_tens_of_gigabytes_need_no_merging() -> None:
    assert arrangement(LIMITS, 1000, 30 * 10**9, as_read=False)["runs"] == 0
    assert arrangement(LIMITS, 16_000, 500 * 10**9, as_read=False)["runs"] > 100


def test_as_read_a_bucket_is_a_piece() -> None:
    assert arrangement(LIMITS, 5000, TERABYTE, as_read=True) == {
        "buckets": 5000,
        "runs": 0,
        "run_pieces": 0,
        "run_slices": 0,
    }
