"""Dropout whose random numbers are a function of (seed, sample, place in the model, element), and of nothing else.

So a row loses the same elements whichever process, micro-batch or order it is computed in, again when a block is
recomputed, and again in a replay. The generator is Squares (Widynski, arXiv 2004.06278): counter-based, four rounds of
64-bit arithmetic. There is no generator state, hence nothing to save in a checkpoint: the key of a row is hashed from
the sample's number in the run.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ADAPTERS = 0x2545F4914F6CDD1D  # odd, as a key stays then
_ADAPTERS_OF_A_BLOCK = 8  # at most: q, k, v, o, gate, up and down
EMBEDDING_PLACE = 0  # the first use of dropout in a model


def row_keys(seed: int, step: int, first_row: int, rows: int, global_batch_size: int, device: torch.device) -> Tensor:
    """int64 [rows], odd: the keys of rows first_row.. of the global batch of the 0-based step `step`."""
    sample = step * global_batch_size + first_row
    keys = [hashlib.sha256(f"dropout/{seed}/{sample + row}".encode()).digest()[:8] for row in range(rows)]
    return torch.tensor(
        [int.from_bytes(key, "little", signed=True) | 1 for key in keys], dtype=torch.int64, device=device
    )


def block_place(layer: int) -> int:
    """The place of a block: its two uses of dropout follow the embedding's and those of the blocks before it."""
    return 1 + 2 * layer


def at_place(keys: Tensor | None, place: int) -> Tensor | None:
    """int64 [B] of `row_keys` -> int64 [B, 2]: each row's key, and the place, the number of a first use of dropout.

    The place travels as data: read from a module it would be a constant, and each layer would compile its own graph.
    """
    return None if keys is None else torch.stack((keys, torch.full_like(keys, place)), 1)


def dropout(x: Tensor, keys: Tensor | None, use: int, probability: float) -> Tensor:
    """x [B, T, C] with each element zeroed with `probability` and the others divided by 1 - probability.

    keys: int64 [B, 2] of `at_place`; None: x itself. use: which use of dropout, counted from that place; no two uses of
    a model share their numbers.
    """
    if keys is None or not probability:
        return x
    size = x[0].numel()
    key, place = keys[:, :1], keys[:, 1:] + use  # [B, 1]
    counters = place * size + torch.arange(size, dtype=torch.int64, device=x.device)  # [B, T C]
    kept = squares(counters, key).view(x.shape) >= round(probability * 2**32)
    return x * (kept.to(x.dtype) * (1 / (1 - probability)))


def adapter_dropout(x: Tensor, keys: Tensor | None, use: int, probability: float) -> Tensor:
    """The same for what an adapter reads, x [B, T, in]: `use` counts the adapters of a block, and their numbers are
    those of keys of their own, so that none is used twice however wide x is.
    """
    if keys is None or not probability:
        return x
    key, place = keys[:, :1] * _ADAPTERS, keys[:, 1:] * _ADAPTERS_OF_A_BLOCK + use  # [B, 1]
    counters = (place << 40) + torch.arange(x[0].numel(), dtype=torch.int64, device=x.device)  # [B, T in]
    kept = squares(counters, key).view(x.shape) >= round(probability * 2**32)
    return x * (kept.to(x.dtype) * (1 / (1 - probability)))


def squares(counters: Tensor, keys: Tensor) -> Tensor:
    """Squares32 of `counters` under `keys`, broadcast: uniform in 0 .. 2^32 - 1, as int64. 64-bit products wrap."""
    x = counters * keys
    y, z = x, x + keys
    x = _rotated(x * x + y)
    x = _rotated(x * x + z)
    x = _rotated(x * x + y)
    return ((x * x + z) >> 32) & _LOW


def _rotated(x: Tensor) -> Tensor:
    """The two halves of each 64-bit number exchanged; the low half is masked, because signed shifts are arithmetic."""
    return ((x >> 32) & _LOW) | (x << 32)
