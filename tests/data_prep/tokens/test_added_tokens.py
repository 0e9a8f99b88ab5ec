"""Whatever `tokenizers` matches as an added token, in the raw or in the normalised text, the test for it finds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from weftrain.data_prep.tokens.added_tokens import may_hold_added_token

NORMALIZERS: dict[str, Any] = {
    "none": None,
    "NFC": normalizers.NFC(),
    "NFKD": normalizers.NFKD(),
    "lowercase": normalizers.Lowercase(),
    "strip accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "strip": normalizers.Strip(),
    "LLaMA's": normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
    "nested": normalizers.Sequence(
        [normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), normalizers.Replace("x", "e")]
    ),
}
CONTENTS = ("café", "CAFÉ", " a ", "\u2581b", "fi", "é")
PIECES = [
    "cafe\u0301",
    "CAF\u00c9",
    "caf",
    "e",
    "\u0301",
    "x\u0301",
    "\u00e9",
    " ",
    "a",
    "b",
    "\u2581",
    "\ufb01",
    "f",
    "I",
    "\u0130",
    ".",
]


def tree_of(normalizer: Any, **flags: bool) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", vocab={"<unk>": 0}, merges=[]))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(content, special=False, **flags) for content in CONTENTS])
    value: dict[str, Any] = json.loads(tokenizer.to_str())
    return value


@pytest.mark.parametrize("name", NORMALIZERS)
@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=1, max_size=12),
    normalized=st.booleans(),
)
def test_no_match_is_missed(name: str, texts: list[str], normalized: bool) -> None:
    for flags in ({}, {"lstrip": True, "rstrip": True}, {"single_word": True}):
        tree = tree_of(NORMALIZERS[name], normalized=normalized, **flags)
        tokenizer, test = Tokenizer.from_str(json.dumps(tree)), may_hold_added_token(tree)
        assert test is not None
        for text in texts:
            assert test(text) or not any(tokenizer.encode(text).ids)


def test_what_cannot_hold_one_is_not_suspected() -> None:
    test = may_hold_added_token(tree_of(NORMALIZERS["NFC"], normalized=True))
    assert test is not None
    assert [test(text) for text in ("cafe", "plain \u00e8 text", "cafe\u0301")] == [False, False, True]
    assert may_hold_added_token({"added_tokens": [{"content": "</s>", "special": True}]}) is None


def test_thousands_of_tokens_are_looked_for_by_their_beginning() -> None:
    plain = {"special": False, "normalized": False}
    test = may_hold_added_token({"added_tokens": [{"content": f"<unused{number}>"} | plain for number in range(3000)]})
    assert test is not None
    assert [test(text) for text in ("<unused3000>", "<unused2999>", "a <unused", "none")] == [False, True, False, False]
