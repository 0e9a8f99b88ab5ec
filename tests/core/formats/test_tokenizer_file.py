"""A tokenizer.json that would give other ids each time, or only some of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from weftrain.analysis.evaluation.tokenizer import open_tokenizer
from weftrain.core.errors import DataError
from weftrain.core.formats.tokenizer_file import (
    MAX_PATTERN_CHARACTERS,
    check_patterns,
    panics_refused,
    repeats_a_repetition,
    tokenizer_from,
)
from weftrain.data_prep.tokens.tokenization import load_encoder, make_encoder

VOCAB = {"</s>": 0, "a": 1, "b": 2, "ab": 3, "aba": 4}


def file_with(model: dict[str, Any] | None = None, **changes: Any) -> bytes:
    tokenizer = Tokenizer(models.BPE(VOCAB, [("a", "b"), ("ab", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tree = json.loads(tokenizer.to_str()) | changes
    tree["model"] |= model or {}
    return json.dumps(tree).encode()


@pytest.mark.parametrize("model", [{"dropout": 0.5}, {"alpha": 0.1}, {"nbest_size": 8}])
def test_random_ids_are_refused_wherever_a_tokenizer_is_opened(tmp_path: Path, model: dict[str, Any]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(file_with(model))
    for read in (
        lambda: load_encoder(path),
        lambda: open_tokenizer(path, 100),
        lambda: tokenizer_from(path.read_bytes(), str(path)),
    ):
        with pytest.raises(
            DataError, match=rf"^{path}: model\.{next(iter(model))} is .* other ids each time; set it to null"
        ):
            read()


@pytest.mark.parametrize("engine", ["tokenizers", "auto"])
def test_neither_cut_nor_padded(tmp_path: Path, engine: str) -> None:
    cut = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    data = file_with({"dropout": 0.0}, truncation=cut, padding=padding)
    assert make_encoder(data, "t", engine=engine).encode(["ab ab ab ab", "b"], ["x", "y"])[0].tolist() == [3] * 4
    (tmp_path / "tokenizer.json").write_bytes(data)
    assert open_tokenizer(tmp_path / "tokenizer.json", 100)[0].encode("ab ab ab ab").ids == [3] * 4


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"model": 3}', b"\xff", b"[" * 100_000])
def test_what_is_no_tokenizer(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^t: not a tokenizer\.json: .*; look$"):
        tokenizer_from(data, "t", "look")


@pytest.mark.parametrize("engine", ["tokenizers", "auto"])
def test_a_pattern_that_takes_too_long_is_a_refusal(engine: str) -> None:
    """The library panics, which is no Exception."""
    slow = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    data = file_with(pre_tokenizer=slow)
    text = "a" * 200 + "b"
    with pytest.raises(DataError, match=r"^x: the tokenizer's library stopped \(.*\): a pattern in it takes too long"):
        make_encoder(data, "t", engine=engine).encode([text], ["x"])
    with pytest.raises(DataError, match=r"^t: the tokenizer's library stopped"), panics_refused("t"):
        tokenizer_from(data, "t").encode(text)
    with pytest.raises(KeyboardInterrupt), panics_refused("t"):
        raise KeyboardInterrupt


PUBLISHED = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    # cl100k
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # o200k
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",
    " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",  # BLOOM
    r"\(+x|[(+)]+|(?:ab)+|(?=(\d{3})+(?!\d))|([^\n]|\n)?x+|[^]a]+|\[+|(?#(a+)+)b",  # signs that are no groups
]
CATASTROPHIC = [
    r"(a+)+$",
    r"(?:a*)*c",
    r"((a+)b?)+",
    r"(x+x+)+y",
    r"(?:a|b+){2,}",
    r"(?i:a+)*",
    r"((?:a+))+",
    r"(a+)?+",
    r"(?<n>a+)+",
]


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_pass(pattern: str) -> None:
    assert not repeats_a_repetition(pattern)


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_a_repeated_repetition_is_found(pattern: str) -> None:
    assert repeats_a_repetition(pattern)
    assert repeats_a_repetition(rf"\d+|{pattern}|\s+")


def test_a_tokenizer_with_such_a_pattern_is_refused_by_every_reader() -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tree = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
    with pytest.raises(
        DataError, match=r"somewhere: not a tokenizer.json: its pattern '\(a\+\)\+\$' repeats a repetition"
    ):
        tokenizer_from(json.dumps(tree).encode(), "somewhere")
    split["pattern"] = {"Regex": "a+"}
    assert tokenizer_from(json.dumps(tree).encode(), "somewhere").encode("aa").ids == [0, 0]


def test_a_long_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="has a pattern of 8,193 characters"):
        check_patterns(
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "a" * (MAX_PATTERN_CHARACTERS + 1)}, "content": ""}}
        )
