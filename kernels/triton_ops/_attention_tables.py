"""What the launches of triton_ops/attention.py are compiled with, by kernel, element size, head width and target.

Nothing is tuned at run time: each line was proven by `weftrain kernels compile`, which says registers, spills and how
many blocks a multiprocessor holds. Why the forward of heads of 128 holds one block on sm_90: 128 queries keep 255
registers of eight warps busy (138 by descriptors), and two blocks of 64 queries, which fit, are the same eight warps
and read k and v twice: 8 bytes a score from the L2 cache, 0.33 cycles where the products and the exponential take 0.18.
"""

from __future__ import annotations

from typing import NamedTuple

from weftrain.kernels.contract import KIN


class Configuration(NamedTuple):
    """What a launch is compiled with besides the shapes: queries and keys in a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _lines(**targets: tuple[int, int, int, int]) -> dict[str, Configuration]:
    """Of every target: one that is not named takes the line of its kin, if that is named."""
    given = targets | {target: targets[kin] for target, kin in KIN.items() if kin in targets and target not in targets}
    return {target: Configuration(*line) for target, line in given.items()}


# (kernel, bytes of an element, head width) -> target -> queries, keys, warps, stages. Heads narrower than 64 take the
# lines of 64. fp32 products are multiply-adds of single elements on NVIDIA, whole tiles unrolled: small tiles, or they
# spill.
CONFIGURATIONS: dict[tuple[str, int, int], dict[str, Configuration]] = {
    ("forward", 2, 64): _lines(
        sm_80=(128, 64, 8, 3), sm_90=(128, 64, 8, 3), sm_100=(128, 64, 4, 3), gfx942=(128, 64, 4, 2)
    ),
    ("forward", 2, 128): _lines(
        sm_80=(128, 32, 8, 3), sm_90=(128, 64, 8, 3), sm_100=(128, 64, 8, 3), gfx942=(128, 64, 4, 2)
    ),
    ("forward", 2, 256): _lines(
        sm_80=(64, 32, 8, 2),
        sm_90=(64, 32, 8, 2),
        sm_100=(64, 64, 8, 2),
        gfx942=(64, 32, 4, 2),
        gfx90a=(32, 32, 4, 1),
    ),
    ("forward", 4, 64): _lines(
        sm_80=(32, 32, 8, 1), sm_90=(32, 32, 8, 1), sm_100=(32, 32, 8, 1), gfx942=(64, 32, 4, 1)
    ),
    ("forward", 4, 128): _lines(
        sm_80=(32, 16, 4, 1),
        sm_90=(16, 16, 4, 1),
        sm_100=(16, 16, 4, 1),
        gfx942=(64, 32, 4, 1),
        sm_86=(16, 16, 4, 1),
        sm_89=(16, 16, 4, 1),
        sm_120=(16, 16, 4, 1),
    ),
    ("forward", 4, 256): _lines(
        sm_80=(16, 16, 4, 1), sm_90=(16, 16, 4, 1), sm_100=(16, 16, 4, 1), gfx942=(32, 16, 4, 1)
    ),
    ("backward_keys", 2, 64): _lines(
        sm_80=(32, 64, 4, 2), sm_90=(64, 128, 8, 2), sm_100=(64, 64, 8, 2), gfx942=(64, 64, 4, 1)
    ),
    ("backward_keys", 2, 128): _lines(
        sm_80=(64, 64, 8, 1), sm_90=(32, 128, 8, 2), sm_100=(64, 64, 8, 2), gfx942=(32, 64, 4, 1)
    ),
    ("backward_keys", 2, 256): _lines(
        sm_80=(32, 32, 8, 2), sm_90=(64, 32, 8, 1), sm_100=(32, 64, 8, 2), gfx942=(16, 32, 4, 1)
    ),
    ("backward_keys", 4, 64): _lines(
        sm_80=(32, 32, 8, 1),
        sm_90=(32, 32, 8, 1),
        sm_100=(32, 32, 8, 1),
        gfx942=(32, 32, 4, 1),
        sm_103=(16, 32, 8, 1),  # 32 queries spill 8 bytes
    ),
    ("backward_keys", 4, 128): _lines(
        sm_80=(16, 16, 4, 1), sm_90=(16, 16, 4, 1), sm_100=(16, 16, 4, 1), gfx942=(16, 32, 4, 1)
    ),
    ("backward_keys", 4, 256): _lines(
        sm_80=(16, 16, 4, 1),
        sm_90=(16, 16, 8, 1),
        sm_100=(16, 16, 8, 1),
        gfx942=(16, 16, 4, 1),
        sm_86=(16, 16, 8, 1),
        sm_89=(16, 16, 8, 1),
        sm_120=(16, 16, 8, 1),
    ),
    ("backward_queries", 2, 64): _lines(
        sm_80=(64, 64, 8, 2), sm_90=(128, 64, 8, 3), sm_100=(128, 64, 8, 2), gfx942=(128, 64, 4, 2)
    ),
    ("backward_queries", 2, 128): _lines(
        sm_80=(64, 64, 8, 2), sm_90=(128, 64, 8, 2), sm_100=(128, 64, 8, 2), gfx942=(64, 32, 4, 2)
    ),
    ("backward_queries", 2, 256): _lines(
        sm_80=(32, 32, 8, 2),
        sm_90=(64, 16, 8, 2),
        sm_100=(64, 64, 8, 1),
        gfx942=(64, 32, 4, 1),
        gfx90a=(64, 16, 4, 1),
    ),
    ("backward_queries", 4, 64): _lines(
        sm_80=(32, 32, 8, 1), sm_90=(32, 32, 8, 1), sm_100=(32, 32, 8, 1), gfx942=(32, 32, 4, 1)
    ),
    ("backward_queries", 4, 128): _lines(
        sm_80=(32, 16, 4, 1),
        sm_90=(16, 16, 4, 1),
        sm_100=(16, 16, 4, 1),
        gfx942=(32, 16, 4, 1),
        sm_120=(16, 16, 4, 1),
    ),
    ("backward_queries", 4, 256): _lines(
        sm_80=(16, 16, 8, 1), sm_90=(16, 16, 8, 1), sm_100=(16, 16, 8, 1), gfx942=(32, 16, 4, 1)
    ),
}

# (bytes of an element, head width) -> target -> what the backward in one kernel takes: backward_keys that adds dq, too,
# in turn. Elsewhere dq has a kernel of its own, which computes two of the products and the probabilities again: 7
# products and 2 exponentials a score where one kernel needs 5 and 1. It pays with traffic to the L2 cache: 4 D /
# block_n bytes a score for dq, where both forms read 4 D / block_n for q and dout. In cycles a score of one
# multiprocessor (products: 2 D / its flops a cycle; exponentials: 1/16; L2: its share of the device's bandwidth):
#
# | device, D, form                  | products + exponentials       | L2                | one kernel instead of two |
# |----------------------------------|-------------------------------|-------------------|---------------------------|
# | sm_90, 64: one, 128 keys         | 5 x 0.03 + 0.06 = 0.21        | 4 / 24 = 0.17     | 0.34 -> 0.21: taken       |
# | sm_90, 128: one, 128 keys        | 5 x 0.06 + 0.06 = 0.36 (0.46) | 8 / 24 = 0.33     | 0.55 (0.61) -> 0.46: taken |
# | sm_90, 256: 32 keys fit          | 5 x 0.12 + 0.06 = 0.66        | 64 / 24 = 2.7     | 0.97 -> 2.7: not taken    |
# | sm_100, 64: one, 128 keys        | 5 x 0.016 + 0.06 = 0.14       | 4 / 36 = 0.11     | 0.23 -> 0.14: taken       |
# | sm_100, 128: 64 keys fit         | 5 x 0.03 + 0.06 = 0.22        | 16 / 36 = 0.44    | 0.34 -> 0.44: not taken   |
# | sm_120, 128: one, 64 keys        | 5 x 0.5 + 0.06 = 2.6          | 16 / 13 = 1.2     | 3.6 -> 2.6: taken         |
#
# In parentheses with what the tile costs: 32 queries use two thirds of HGMMA's rate, and dq of 32 rows is HMMA. Not on
# sm_80, sm_86 and sm_89, which have no float atomics of 16 bytes; not on AMD, whose L2 caches are several and not
# coherent; not in fp32, where tiles are 16 keys wide. No GPU has confirmed this: `weftrain kernels bench` does.
ONE_KERNEL_BACKWARD: dict[tuple[int, int], dict[str, Configuration]] = {
    (2, 64): _lines(sm_90=(64, 128, 8, 2), sm_100=(64, 128, 8, 2), sm_120=(32, 64, 4, 2)),
    (2, 128): _lines(sm_90=(32, 128, 8, 2), sm_120=(32, 64, 8, 2)),
}

# (kernel, bytes of an element, head width) -> target -> what is taken instead where query heads share a key head; None:
# not this kernel.
GROUPED: dict[tuple[str, int, int], dict[str, Configuration | None]] = {
    ("backward_keys", 2, 64): {"sm_90": Configuration(32, 128, 8, 2)},  # 64 queries spill 8 bytes
    ("backward", 2, 64): {"sm_90": Configuration(32, 128, 8, 2)},  # 64 queries spill 32 bytes
    ("backward", 2, 128): {"sm_90": None},  # 32 queries spill 56 bytes, and 16 leave HGMMA at a third of its rate
}

# In bf16 with head width 128 and documents: what a launch could take on a target besides its line, and why some targets
# could not.
CANDIDATES: dict[tuple[str, Configuration], dict[str, str]] = {
    ("described", Configuration(128, 128, 8, 2)): {},
    ("described", Configuration(64, 64, 4, 2)): {},
    ("forward", Configuration(64, 64, 4, 2)): {"sm_86": "spills 24 bytes", "sm_120": "spills 16 bytes"},
    ("forward", Configuration(128, 32, 8, 3)): {},
    ("forward", Configuration(128, 64, 8, 3)): {
        "sm_80": "spills 8 bytes",
        "sm_86": "spills 24 bytes",
        "sm_120": "spills 64 bytes",
        "gfx90a": "needs 80 KiB of 64 KiB shared memory",
        "gfx942": "needs 80 KiB of 64 KiB shared memory",
        "gfx950": "spills 136 bytes",
    },
    ("backward_keys", Configuration(32, 64, 8, 2)): {
        "gfx90a": "spills 1280 bytes",
        "gfx942": "spills 1320 bytes",
        "gfx950": "spills 1840 bytes",
    },
    ("backward_queries", Configuration(64, 64, 8, 2)): {
        "sm_100": "spills 16 bytes",
        "gfx90a": "spills 800 bytes",
        "gfx942": "spills 640 bytes",
        "gfx950": "spills 808 bytes",
    },
    ("backward_queries", Configuration(64, 32, 4, 2)): {},
}


# Head width -> target -> what the forward takes where q, k and v can be described (TMA): one thread starts the copy of
# a whole tile, rows beyond T are zeros without a mask, and no registers hold addresses (sm_90, D 128: 138 instead of
# 255). A grid that stays on the device (persistent) was not built: there is a program for each tile, the longest first,
# and all that it would save is the first load of a tile.
DESCRIBED_FORWARD: dict[int, dict[str, Configuration]] = {
    64: _lines(sm_90=(128, 64, 8, 3), sm_100=(128, 64, 4, 3)),
    128: _lines(sm_90=(128, 64, 8, 3), sm_100=(128, 64, 4, 2)),
    256: _lines(sm_90=(64, 32, 8, 2), sm_100=(64, 64, 8, 2)),
}


def configuration(kernel: str, on: str, element_size: int, block_d: int, grouped: bool = False) -> Configuration:
    """What a launch of `kernel` takes on target `on`, for elements of 2 or 4 bytes in heads padded to block_d."""
    return lines(kernel, element_size, max(64, block_d), grouped)[on]


def one_kernel_backward(on: str, element_size: int, block_d: int, grouped: bool) -> Configuration | None:
    """What the backward in one kernel takes; None: there are two, which is also right for every call."""
    return lines("backward", element_size, max(64, block_d), grouped).get(on)


def lines(kernel: str, element_size: int, head_width: int, grouped: bool) -> dict[str, Configuration]:
    """The configurations of one kernel by target. Of some targets: "described" is forward by descriptors, "backward" is
    backward_keys with dq.
    """
    key = kernel, element_size, head_width
    if kernel == "described":
        return DESCRIBED_FORWARD[head_width] if element_size == 2 else {}
    usual = ONE_KERNEL_BACKWARD.get(key[1:], {}) if kernel == "backward" else CONFIGURATIONS[key]
    taken = usual | (GROUPED.get(key, {}) if grouped else {})
    return {target: found for target, found in taken.items() if found is not None}
