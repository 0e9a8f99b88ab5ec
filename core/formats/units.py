"""Sizes in words, one way everywhere: memory and models in GiB (2^30 bytes), disk, network and files in GB (10^9)."""

from __future__ import annotations

import math


def gib(size_bytes: float) -> str:
    """Memory or the size of a model: '79.15 GiB'."""
    return f"{digits(size_bytes / 2**30)} GiB"


def gb(size_bytes: float) -> str:
    """A size on disk, in a file or sent: '2.40 GB'. Append '/s' for a speed."""
    return f"{digits(size_bytes / 1e9)} GB"


def digits(value: float) -> str:
    """Two decimals from 1 on; below it three significant digits, and no more than seven decimals."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    decimals = 2 if abs(value) >= 0.9995 else min(7, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
