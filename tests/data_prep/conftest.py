"""A tokenizer and documents small enough for every test, and helper modules that importlib mode does not find."""

from __future__ import annotations

import pytest

from weftrain.data_prep.tokens.tokenization import TextEncoder
from weftrain.data_prep.tokens.training import train_encoder

WORDS = "the weft is carried across a warp by hand and the loom keeps every thread in its place"


def sentences(count: int) -> list[str]:
    """Different short texts with some structure to learn from."""
    words = WORDS.split()
    return [
        f"{number}: " + " ".join(words[(number * 7 + n * n) % len(words)] for n in range(5 + number % 40))
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def encoder() -> TextEncoder:
    return train_encoder(sentences(300), 320)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return sentences(120)
