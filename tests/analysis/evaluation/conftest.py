"""What the tests of evaluations share."""

from __future__ import annotations

import pytest
import torch
from evaluation_stubs import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the matrices are too small to share


@pytest.fixture(scope="module")
def stub_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
