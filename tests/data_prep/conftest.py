"""A tokenizer and documents small enough for every test, and helper modules that importlib mode does not find."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from weftrain.data_prep.tokens.tokenization import TextEncoder, train_encoder

for _path in (Path(__file__).parents[1] / "core" / "fault_injection.py", Path(__file__).with_name("independent_reader.py")):
    if _path.stem not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_path.stem, _path)
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[_path.stem] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_path.stem])


WORDS = "the weft is carried across a warp by hand and the loom keeps every thread in its place"


def sentences(count: int) -> list[str]:
    """Different short texts with some structure to learn from."""
    words = WORDS.split()
    return [f"{number}: " + " ".join(words[(number * 7 + n * n) % len(words)] for n in range(5 + number % 40)) for number in range(count)]


@pytest.fixture(scope="session")
def encoder() -> TextEncoder:
    return train_encoder(sentences(300), 320)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return sentences(120)
