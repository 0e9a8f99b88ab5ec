"""A tokenizer is held to its model, and begins and ends texts as training did."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from evaluation_stubs import WORDS
from tokenizers import Tokenizer

from weftrain.analysis.evaluation.tokenizer import end_of_text_id, open_tokenizer
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset_manifest import DatasetManifest


def test_tokenizer_that_does_not_fit(stub_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    stub_tokenizer.save(str(path))
    tokenizer, sha256 = open_tokenizer(path, len(WORDS))
    assert len(sha256) == 64
    assert end_of_text_id(tokenizer, path) == 0
    with pytest.raises(DataError, match=rf"{path}.*largest id {len(WORDS) - 1}.*--tokenizer"):
        open_tokenizer(path, len(WORDS) - 1)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        open_tokenizer(path, 100)
    with pytest.raises(DataError, match="cannot read"):
        open_tokenizer(tmp_path / "absent", 100)


def test_texts_begin_and_end_as_the_documents_that_were_trained_on(stub_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    stub_tokenizer.save(str(path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    plain, begun = (
        DatasetManifest.model_construct(tokenizer_sha256=sha256, eos_id=eos_id, bos_id=bos_id)
        for eos_id, bos_id in ((3, None), (None, 2))
    )
    ids = stub_tokenizer.encode(f"{WORDS[4]} {WORDS[5]}").ids
    tokenizer, _ = open_tokenizer(path, len(WORDS), (tmp_path, plain))
    assert tokenizer.encode(f"{WORDS[4]} {WORDS[5]}").ids == ids
    assert end_of_text_id(tokenizer, path, plain) == 3
    tokenizer, _ = open_tokenizer(path, len(WORDS), (tmp_path, begun))
    assert tokenizer.encode(f"{WORDS[4]} {WORDS[5]}").ids == [2, *ids]
    assert tokenizer.encode(WORDS[4], add_special_tokens=False).ids == ids[:1]
    assert tokenizer.encode("").ids == [2]  # what lm-eval puts before a text without context
    assert end_of_text_id(tokenizer, path, begun) == 2
