"""A tokenizer and documents small enough for every test, and helper modules that importlib mode does not find."""

from __future__ import annotations

import pytest
from made_texts import sentences

from weftrain.data_prep.tokens.tokenization import TextEncoder
from weftrain.data_prep.tokens.training import train_encoder


@pytest.fixture(scope="session")
def encoder() -> TextEncoder:
    return train_encoder(sentences(300), 320)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return sentences(120)
