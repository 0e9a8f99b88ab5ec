"""A size is told in one unit, with enough digits for the smallest."""

from __future__ import annotations

import pytest

from weftrain.core.formats.units import gb, gib


@pytest.mark.parametrize(
    ("size_bytes", "memory", "file"),
    [
        (0, "0 GiB", "0 GB"),
        (2**30, "1.00 GiB", "1.07 GB"),
        (10**9, "0.931 GiB", "1.00 GB"),
        (5 * 2**40, "5,120.00 GiB", "5,497.56 GB"),
        (2**20, "0.000977 GiB", "0.00105 GB"),
        (1, "0.0000000 GiB", "0.0000000 GB"),
        (2**30 - 1, "1.00 GiB", "1.07 GB"),
    ],
)
def test_sizes(size_bytes: int, memory: str, file: str) -> None:
    assert (gib(size_bytes), gb(size_bytes)) == (memory, file)
