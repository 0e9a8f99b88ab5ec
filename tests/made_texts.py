"""Different short texts with some structure to learn from, the same in every run."""

from __future__ import annotations

WORDS = [
    "the",
    "weft",
    "is",
    "carried",
    "across",
    "a",
    "warp",
    "by",
    "hand",
    "and",
    "the",
    "loom",
    "keeps",
    "every",
    "thread",
    "in",
    "its",
    "place",
]


def sentences(count: int) -> list[str]:
    """`count` texts of 5 to 44 words after a number of their own."""
    return [
        f"{number}: " + " ".join(WORDS[(number * 7 + k * k) % len(WORDS)] for k in range(5 + number % 40))
        for number in range(count)
    ]
