"""Checksums of planes and gradients."""

from __future__ import annotations

import numpy as np

from weftrain.backends.streaming.store.checksums import Running, checksum


def test_checksums_find_what_damages_a_file() -> None:
    """A bit, a zeroed page, two pages in each other's place, another tile's, an older version: each changes the sum.
    Parts add up.
    """
    data = np.random.default_rng(1).integers(0, 256, 5 * 4096 + 64, dtype=np.uint8)
    whole = checksum(data, 3, 0, 7)
    running = Running(3, 0, 7)
    running.add(data[:8192])
    running.add(data[8192:])
    assert running.value == whole
    changed = [data.copy() for _ in range(4)]
    changed[0][17] ^= 4
    changed[1][4096:8192] = 0
    changed[2][:8192] = np.concatenate([data[4096:8192], data[:4096]])
    changed[3][-1] ^= 128
    assert (
        len({checksum(other, 3, 0, 7) for other in changed} | {whole, checksum(data, 4, 0, 7), checksum(data, 3, 0, 8)})
        == 7
    )
