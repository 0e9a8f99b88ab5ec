"""Patterns of tokenizers: those that are published pass, and what repeats a repetition is refused before any text is
encoded.
"""

from __future__ import annotations

import json

import pytest

from weftrain.core.errors import DataError
from weftrain.core.formats.tokenizer_file import tokenizer_from
from weftrain.core.formats.tokenizer_patterns import MAX_PATTERN_CHARACTERS, check_patterns, repeats_a_repetition

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
