"""A keyed permutation of 0..n-1 without a table: any n, constant memory, random access.

A Feistel network of ten rounds over the smallest 2^b >= n (at least 64), with cycle walking back into 0..n-1 (Black &
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). An index costs about 50 ns, but only in blocks of thousands,
since each numpy call costs a microsecond. So `lookup` computes blocks of 4096 and caches them: callers read neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from weftrain.core.formats.canonical import canonical_json

BLOCK = 4096
MAX_SIZE = 1 << 62
ROUNDS = 10  # 6 looked biased in measurements, 8 did not; an even number returns the halves to their widths
_MIN_BITS = 6
_MULTIPLIERS = np.array([0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53], dtype=np.uint64)  # MurmurHash3's 64-bit finaliser


def derive_key(*parts: str | int) -> bytes:
    """ROUNDS 64-bit round keys from any description; different descriptions give unrelated permutations."""
    return hashlib.shake_256(canonical_json(parts)).digest(8 * ROUNDS)


def permute(indices: np.ndarray, size: int, key: bytes) -> np.ndarray:
    """int64 `indices` within 0..size-1 -> their images, int64, in the same shape. Raises ValueError for a size outside
    1..2^62.
    """
    return _walked(_network, indices, size, key)


def invert(images: np.ndarray, size: int, key: bytes) -> np.ndarray:
    """The inverse of `permute`."""
    return _walked(_inverse_network, images, size, key)


def _walked(
    network: Callable[[np.ndarray, int, np.ndarray], np.ndarray], indices: np.ndarray, size: int, key: bytes
) -> np.ndarray:
    """The network applied until every value lies below `size` (cycle walking)."""
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"a permutation's size must lie in 1..2^62, not {size}")
    bits = max((size - 1).bit_length(), _MIN_BITS)
    keys = np.frombuffer(key, dtype="<u8")
    values = network(indices.astype(np.uint64).reshape(-1), bits, keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:  # fewer than half are outside, each time, once size > 64
        walked = network(values[outside], bits, keys)
        values[outside] = walked
        outside = outside[walked >= size]
    return values.astype(np.int64).reshape(indices.shape)


def lookup(indices: np.ndarray, size: int, key: bytes) -> np.ndarray:
    """`permute` through a cache of whole blocks, for indices that lie close together."""
    blocks = indices // BLOCK
    result = np.empty(indices.shape, dtype=np.int64)
    for block in np.unique(blocks).tolist():
        chosen = blocks == block
        result[chosen] = _block(size, key, block)[indices[chosen] - block * BLOCK]
    return result


@lru_cache(maxsize=256)  # 32 KiB each
def _block(size: int, key: bytes, block: int) -> np.ndarray:
    start = block * BLOCK
    images = permute(np.arange(start, min(start + BLOCK, size), dtype=np.int64), size, key)
    images.flags.writeable = False
    return images


def _network(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """(left, right) -> (right, left ^ f(right)), ROUNDS times, for uint64 values below 2^bits. The halves' widths may
    differ by a bit.
    """
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for key in keys:
        mixed = _mixed(right, key, left_bits)
        mixed ^= left
        left, right = right, mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _inverse_network(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """The rounds of `_network` undone, the last one first."""
    left_bits, right_bits = bits // 2, bits - bits // 2  # an even number of rounds: as at the start
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for key in keys[::-1]:
        left_bits, right_bits = right_bits, left_bits
        left, right = right ^ _mixed(left, key, left_bits), left
    return (left << np.uint64(right_bits)) | right


def _mixed(half: np.ndarray, key: np.uint64, bits: int) -> np.ndarray:
    """The round function: `bits` bits of uint64 `half` hashed with the round's key."""
    mixed = half ^ key
    mixed *= _MULTIPLIERS[0]
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MULTIPLIERS[1]
    mixed >>= np.uint64(64 - bits)  # the product's high bits are its best
    return mixed
