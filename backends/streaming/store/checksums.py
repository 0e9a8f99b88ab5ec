"""Checksums of a store's files: one for each plane of each tile, and one for each spooled gradient. No torch.

The words of each page are added modulo 2^64, and the sums of the pages, in order, are hashed (BLAKE2b, 8 bytes)
together with the tile, plane and rotation. That runs at the speed of memory (a CRC takes several times as long) and
detects the usual damage: a changed bit, a zeroed, stale or misplaced page, a tile of another rotation. It is no
signature, and two changes within one page that cancel out are not detected.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

PAGE_WORDS = 512  # 8 bytes each
MAX_PLANES = 8  # of a tile, in an entry of fixed size


class Running:
    """The checksum of one plane that is given in parts, each beginning on a page. of: tile, plane and rotation."""

    def __init__(self, *of: int) -> None:
        self._hash = hashlib.blake2b(struct.pack(f"<{len(of)}q", *of), digest_size=8)

    def add(self, part: np.ndarray) -> None:
        """part: uint8 [n], n a multiple of 8, aligned to 8 bytes; only the last part may end within a page."""
        words = part.view(np.uint64)
        whole = len(words) // PAGE_WORDS * PAGE_WORDS
        self.add_sums(np.add.reduce(words[:whole].reshape(-1, PAGE_WORDS), axis=1))
        if whole < len(words):
            self._hash.update(np.add.reduce(words[whole:]))

    def add_sums(self, sums: np.ndarray) -> None:
        """The sums of whole pages, modulo 2^64, 8 bytes each."""
        self._hash.update(sums.tobytes())

    @property
    def value(self) -> int:
        return int.from_bytes(self._hash.digest(), "little")


def checksum(part: np.ndarray, *of: int) -> int:
    """The checksum of a whole plane."""
    running = Running(*of)
    running.add(part)
    return running.value
