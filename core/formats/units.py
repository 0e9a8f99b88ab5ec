"""Sizes in words, one way everywhere: memory and models in GiB (2^30 bytes), disk, network and files in GB (10^9).

tests/core/formats/test_units.py holds the messages to it. Only a GPU's shared memory and the code compiled for it are
told in KiB, as in every vendor's manual, and names of options and fields keep the unit that their values have.
"""

from __future__ import annotations

import math


def gib(size_bytes: float) -> str:
    """Memory or the size of a model: '79.15 GiB'."""
    return f"{digits(size_bytes / 2**30)} GiB"


def gb(size_bytes: float) -> str:
    """A size on disk, in a file or sent: '2.40 GB'. Append '/s' for a speed."""
    return f"{digits(size_bytes / 1e9)} GB"


def gb_done(done_bytes: float, total_bytes: float) -> str:
    """Progress: '0.0030/0.0120 GB', both with the decimals of the total."""
    decimals = _decimals(total_bytes / 1e9)
    return f"{done_bytes / 1e9:,.{decimals}f}/{total_bytes / 1e9:,.{decimals}f} GB"


def digits(value: float) -> str:
    """Two decimals from 1 on; below it three significant digits, and no more than seven decimals."""
    return f"{value:,.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    if value == 0 or not math.isfinite(value):
        return 0
    return 2 if abs(value) >= 0.9995 else min(7, 2 - math.floor(math.log10(abs(value))))
