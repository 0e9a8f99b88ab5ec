"""Dropout: its generator, its share, and that a row loses the same elements wherever it is computed."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from weftrain.core.dropout import at_place, dropout, row_keys, squares

CPU = torch.device("cpu")


def test_squares_is_the_published_generator() -> None:
    """Against a version in Python's own integers, at random keys and counters, wrapping included."""

    def reference(counter: int, key: int) -> int:
        mask = 2**64 - 1
        y = x = counter * key & mask
        z = (y + key) & mask
        for added in (y, z, y):
            x = (x * x + added) & mask
            x = (x >> 32 | x << 32) & mask
        return (x * x + z & mask) >> 32

    generator = np.random.default_rng(3)
    keys = generator.integers(0, 2**64, 50, dtype=np.uint64) | np.uint64(1)
    counters = generator.integers(0, 2**48, 50)
    found = squares(torch.from_numpy(counters), torch.from_numpy(keys.view(np.int64)))
    assert found.tolist() == [reference(int(counter), int(key)) for counter, key in zip(counters, keys, strict=True)]


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    keys = at_place(row_keys(7, 3, 0, 16, 16, CPU), 1)
    x = torch.ones(16, 64, 128)
    dropped = dropout(x, keys, 1, 0.1)
    # 131,072 draws: more than three standard deviations
    assert float((dropped == 0).float().mean()) == pytest.approx(0.1, abs=0.003)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.004)
    assert not torch.equal(dropped == 0, dropout(x, keys, 2, 0.1) == 0)
    # place 1, use 1 is number 2
    assert torch.equal(dropped, dropout(x, at_place(row_keys(7, 3, 0, 16, 16, CPU), 2), 0, 0.1))
    assert not torch.equal(dropped[0], dropped[1])
    assert dropout(x, None, 2, 0.1) is x
    kept = np.packbits((dropped != 0).numpy())
    assert hashlib.sha256(kept.tobytes()).hexdigest()[:16] == "78367a24e8f1a4fa"  # as recorded runs drew it


def test_a_row_loses_the_same_elements_in_any_micro_batch() -> None:
    x = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(4))
    whole = dropout(x, at_place(row_keys(1, 9, 0, 8, 8, CPU), 1), 0, 0.5)
    part = dropout(x[3:5], at_place(row_keys(1, 9, 3, 2, 8, CPU), 1), 0, 0.5)
    assert torch.equal(whole[3:5], part)
    assert not torch.equal(whole, dropout(x, at_place(row_keys(1, 10, 0, 8, 8, CPU), 1), 0, 0.5))
