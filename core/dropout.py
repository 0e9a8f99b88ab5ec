"""Dropout whose random numbers are a function of (seed, sample, place in the model, element), and of nothing else.

So a row loses the same elements whichever process, micro-batch or order it is computed in, again when a block is recomputed, and again
in a replay. The generator is Squares (Widynski, arXiv 2004.06278): counter-based, four rounds of 64-bit arithmetic. What a reader would get
wrong: there is no generator state, hence nothing to save in a checkpoint; the key of a row is hashed from the sample's number in the run.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def row_keys(seed: int, step: int, first_row: int, rows: int, global_batch_size: int, device: torch.device) -> Tensor:
    """int64 [rows], odd: the keys of rows first_row.. of the global batch of the 0-based step `step`."""
    sample = step * global_batch_size + first_row
    keys = [hashlib.sha256(f"dropout/{seed}/{sample + row}".encode()).digest()[:8] for row in range(rows)]
    return torch.tensor([int.from_bytes(key, "little", signed=True) | 1 for key in keys], dtype=torch.int64, device=device)


def dropout(x: Tensor, keys: Tensor | None, place: int, probability: float) -> Tensor:
    """x [B, T, C] with each element zero with `probability`, the others divided by 1 - probability; x itself where keys is None.

    keys: int64 [B] of `row_keys`, odd. place: number of this use of dropout within the model: no two share their numbers.
    """
    if keys is None or not probability:
        return x
    size = x[0].numel()
    counters = torch.arange(place * size, (place + 1) * size, dtype=torch.int64, device=x.device).view(1, *x.shape[1:])
    numbers = squares(counters, keys.view(-1, *[1] * (x.dim() - 1)))
    kept = numbers >= round(probability * 2**32)
    return x * (kept.to(x.dtype) * (1 / (1 - probability)))


def squares(counters: Tensor, keys: Tensor) -> Tensor:
    """32-bit numbers, uniform in 0 .. 2^32 - 1, as int64: Squares32 of `counters` under `keys`, broadcast. 64-bit products wrap."""
    x = counters * keys
    y, z = x, x + keys
    x = _rotated(x * x + y)
    x = _rotated(x * x + z)
    x = _rotated(x * x + y)
    return ((x * x + z) >> 32) & _LOW


def _rotated(x: Tensor) -> Tensor:
    """The two halves of each 64-bit number exchanged; the shift of a signed number is arithmetic, so the low half is masked."""
    return ((x >> 32) & _LOW) | (x << 32)
