"""Tokenizers: lossless, deterministic, and no text ever becomes a control token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from weftrain.core.errors import DataError
from weftrain.data_prep.tokens.control_tokens import CONTROL_TOKENS, CRYSTALCODER_TOKENS
from weftrain.data_prep.tokens.markers import Markers
from weftrain.data_prep.tokens.tokenization import Counts, TextEncoder, load_encoder, make_encoder
from weftrain.data_prep.tokens.training import train_encoder

# Ids above the base vocabulary, from the published order of CrystalCoder's special tokens (32000 + these).
PUBLISHED = {
    "fim_prefix": 0,
    "fim_middle": 1,
    "fim_suffix": 2,
    "fim_pad": 3,
    "filename": 4,
    "gh_stars": 5,
    "issue_start": 6,
    "issue_comment": 7,
    "issue_closed": 8,
    "jupyter_start": 9,
    "jupyter_text": 10,
    "jupyter_code": 11,
    "jupyter_output": 12,
    "empty_output": 13,
    "commit_before": 14,
    "commit_msg": 15,
    "commit_after": 16,
    "reponame": 17,
    "im_start": 18,
    "im_end": 19,
    "sys_start": 20,
    "sys_end": 21,
}


def encode(encoder: TextEncoder, text: str) -> np.ndarray:
    return encoder.encode([text], ["text"])[0]


def test_ids_stand_where_crystalcoder_has_them(encoder: TextEncoder) -> None:
    tokenizer = Tokenizer.from_str(encoder.data.decode())
    assert [tokenizer.token_to_id(token) for token in CONTROL_TOKENS] == [0, 1, 2]
    assert encoder.eos_id == 2
    assert encoder.vocab_size == 320 + 32 == 320 + len(CRYSTALCODER_TOKENS)
    assert {name: tokenizer.token_to_id(f"<|{name}|>") - 320 for name in PUBLISHED} == PUBLISHED
    assert encoder.control_ids.tolist() == [0, 1, 2, *range(320, 352)]


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(
        st.one_of(st.text(max_size=20), st.sampled_from([*CONTROL_TOKENS, *CRYSTALCODER_TOKENS, "<fim_prefix>"])),
        max_size=12,
    )
)
def test_any_text_comes_back_and_never_as_a_control_token(encoder: TextEncoder, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = encode(encoder, text)
    assert encoder.decode(ids) == text
    assert not np.isin(ids, encoder.control_ids).any()
    assert ids.dtype == np.uint16


def test_special_tokens_in_text_are_spelled_out(encoder: TextEncoder) -> None:
    text = "".join(f"a {token} b" for token in (*CONTROL_TOKENS, *CRYSTALCODER_TOKENS, "<fim_prefix>", "<|endoftext|>"))
    assert encoder.decode(encode(encoder, text)) == text
    matched = Tokenizer.from_str(encoder.data.decode()).encode(text).ids  # the library's default does match them
    assert np.isin(matched, encoder.control_ids).any()


def test_training_twice_gives_the_same_bytes(encoder: TextEncoder, texts: list[str]) -> None:
    first, second = (train_encoder(texts, 300) for _ in range(2))
    assert first.data == second.data
    assert first.sha256 == second.sha256 != encoder.sha256


def test_training_without_enough_text_or_room() -> None:
    with pytest.raises(DataError, match=r"the text yields \d+ tokens, not 5000"):
        train_encoder(["a b a b"], 5000)
    with pytest.raises(DataError, match="no room for 256 bytes"):
        train_encoder(["a b"], 258)


def word_tokenizer(*special: str) -> bytes:
    """A tokenizer whose vocabulary of words holds its own special tokens, so that it cannot spell them out."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer.to_str().encode()


def test_a_tokenizer_that_cannot_spell_its_special_tokens_is_refused_with_the_document() -> None:
    encoder = make_encoder(word_tokenizer("</s>"), "t.json")
    assert encode(encoder, "a b a").tolist() == [0, 1, 0]
    with pytest.raises(
        DataError, match=r"good/bad\.txt: the tokenizer turns ordinary text into control id 2 at token 1"
    ):
        encoder.encode(["a", "b </s>"], ["fine", "good/bad.txt"])


def test_each_text_that_cannot_be_encoded_has_its_reason() -> None:
    encoder = make_encoder(word_tokenizer("</s>"), "t.json")
    counts = Counts()
    ids, refused, empty = encoder.encode_each(["a b", "a a </s> </s>", ""], ["x", "y", "z"], None, counts)
    assert isinstance(refused, str)
    assert refused.startswith("the tokenizer turns ordinary text into control id 2 at token 2; use a tokenizer")
    assert (np.asarray(ids).tolist(), np.asarray(empty).tolist(), counts.unknown) == ([0, 1], [], 0)


def unknown_tokenizers() -> dict[str, Any]:
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    unigram = models.Unigram([(token, -1.0) for token in vocab], unk_id=0, byte_fallback=False)
    return {
        "WordPiece": models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix=""),
        "Unigram": unigram,
        "BPE": models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=False),
        "WordLevel": models.WordLevel(vocab, unk_token="<unk>"),
    }


@pytest.mark.parametrize("kind", unknown_tokenizers())
@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_unknown_text_becomes_the_unknown_token_and_is_counted(kind: str, engine: str) -> None:
    tokenizer = Tokenizer(unknown_tokenizers()[kind])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("</s>", special=True)])
    encoder = make_encoder(tokenizer.to_str().encode(), "t", engine=engine)
    assert encoder.unknown_id == 0
    assert encoder.control_ids.tolist() == [1]
    counts = Counts()
    assert encoder.encode(["a \u65e5 b", "a", "\u672c"], ["x", "y", "z"], None, counts)[0].tolist() == [2, 0, 3]
    assert counts.unknown == 2


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_text_that_a_tokenizer_would_leave_out_is_a_failure(engine: str) -> None:
    """A BPE without an unknown token drops what it does not know, without a word."""
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert tokenizer.encode("a \u65e5 ab").ids == [1, 3]
    encoder = make_encoder(tokenizer.to_str().encode(), "t", engine=engine)
    good, bad = encoder.encode_each(["a ab", "a \u65e5 ab"], ["x", "y"])
    assert not isinstance(good, str)
    assert good.tolist() == [1, 3]
    assert bad == (
        "has text that the vocabulary cannot spell, and that the tokenizer would leave out after token 1; "
        "use a tokenizer with an unknown token or with bytes"
    )
    assert encoder.vocab_size == 4


def test_an_end_token_that_also_stands_for_unknown_text_is_not_written_into_documents() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "a": 1}, merges=[], unk_token="<|endoftext|>"))
    encoder = make_encoder(tokenizer.to_str().encode(), "t")
    assert encoder.unknown_id is None
    with pytest.raises(DataError, match="x: the tokenizer turns ordinary text into control id 0 at token 1"):
        encoder.encode(["ab"], ["x"])


def test_the_end_token_is_found_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(word_tokenizer("</s>", "<|endoftext|>", "<end>"))
    assert load_encoder(path).eos_id == 2
    assert load_encoder(path, Markers("<|endoftext|>")).eos_id == 4
    assert load_encoder(path, Markers("<end>")).eos_id == 5
    with pytest.raises(DataError, match="has no token '<eot>' for --eos; its special tokens are"):
        load_encoder(path, Markers("<eot>"))
    value: dict[str, Any] = json.loads(word_tokenizer())
    value["model"]["vocab"] = {"a": 0, "<unk>": 1}
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"has no token </s> or <\|endoftext\|>"):
        load_encoder(path)


def test_settings_of_the_file_that_cut_or_pad_are_off(encoder: TextEncoder) -> None:
    tokenizer = Tokenizer.from_str(encoder.data.decode())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    text = "the weft is carried across a warp"
    assert np.array_equal(encode(make_encoder(tokenizer.to_str().encode(), "t"), text), encode(encoder, text))


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_encoder(tmp_path / "none.json")
    for contents in (b"", b"{}", b"[1]", b"\xff", b'{"model": {"type": "Other"}}'):
        (tmp_path / "t.json").write_bytes(contents)
        with pytest.raises(DataError, match=r"t\.json: not a tokenizer\.json") as caught:
            load_encoder(tmp_path / "t.json")
        assert "\n" not in str(caught.value)
