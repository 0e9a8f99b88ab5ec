"""The matrix-multiply peak that MFU is measured against, as a run records it."""

from __future__ import annotations

import torch

from weftrain.core.run.speed import Peak
from weftrain.kernels.bench.roofline import measured_matmul_peak, table_peak


def measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of one device, measured now: about a second on two cores."""
    rate = measured_matmul_peak(device, dtype)
    return Peak(rate.per_second, rate.origin)


def sourced_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The data sheet's peak of one device, or unknown."""
    rate = table_peak(device, dtype)
    return Peak(rate.per_second, rate.origin)
