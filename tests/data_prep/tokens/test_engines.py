"""Two engines, the same ids: on code, on Unicode, on text full of control tokens, on a line of a megabyte; and what
happens if not.
"""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from weftrain.core.errors import DataError
from weftrain.data_prep.tokens import engines, tokenization
from weftrain.data_prep.tokens.control_tokens import CRYSTALCODER_TOKENS
from weftrain.data_prep.tokens.long_texts import cutting_of
from weftrain.data_prep.tokens.markers import Markers
from weftrain.data_prep.tokens.tokenization import Counts, EnginesDifferError, TextEncoder, make_encoder
from weftrain.data_prep.tokens.training import train_encoder

HAS_GIGATOKEN = engines.open_gigatoken({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}) != engines.MISSING
ENGINES = [
    "tokenizers",
    pytest.param("gigatoken", marks=pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")),
]
HARD = [
    "",
    " ",
    "  ",
    "a  b   c\n\n\n  d",
    "é e\u0301 \ufb01",
    "日本語",
    "😀\u200d👧",
    "a\r\nb\tc",
    " lead",
    "trail ",
    "\u2581 x \u2581\u2581",
    "\x00\x01",
]
CONTROL = [
    "</s>",
    "x</s>y <s> <unk>",
    "<|fim_prefix|>a<|fim_suffix|>",
    "<fim_prefix><fim_middle>",
    "<|endoftext|>",
    "<0x41>",
]


def library(count: int) -> list[str]:
    return [path.read_text() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:count]]


@pytest.fixture(scope="module")
def byte_level() -> bytes:
    return train_encoder(library(40), 2000).data


@pytest.fixture(scope="module")
def llama_like() -> bytes:
    """BPE without a pre-tokenizer, a space written as one character, bytes for what it does not know: LLaMA's
    construction, 3,000 ids.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        library(40), trainers.BpeTrainer(vocab_size=3000, special_tokens=special, show_progress=False)
    )
    tree = json.loads(tokenizer.to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    tree["pre_tokenizer"], tree["model"]["fuse_unk"] = None, True
    tree["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    undo = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    tree["decoder"] = {
        "type": "Sequence",
        "decoders": [*undo, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    for run in ("\u2581\u2581", "\u2581\u2581\u2581\u2581"):  # runs of spaces are entries, as in LLaMA's
        tree["model"]["vocab"][run] = len(tree["model"]["vocab"])
        tree["model"]["merges"].append([run[: len(run) // 2]] * 2)
    first = len(tree["model"]["vocab"])
    added = [token for token in tree["added_tokens"] if token["content"] in ("<unk>", "<s>", "</s>")]
    fim = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] = added + [
        {"id": first + index, "content": name} | fim for index, name in enumerate(CRYSTALCODER_TOKENS)
    ]
    return json.dumps(tree).encode()


@pytest.fixture(params=["byte_level", "llama_like"])
def data(request: pytest.FixtureRequest) -> bytes:
    value: bytes = request.getfixturevalue(request.param)
    return value


def ids_of(encoder: TextEncoder, texts: list[str], counts: Counts | None = None) -> list[list[int]]:
    return [ids.tolist() for ids in encoder.encode(texts, [str(index) for index in range(len(texts))], None, counts)]


@pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")
def test_both_engines_give_the_same_ids(data: bytes) -> None:
    fast, reference = make_encoder(data, "t", engine="gigatoken"), make_encoder(data, "t", engine="tokenizers")
    texts = [*HARD, *CONTROL, *library(60)]
    by_fast, by_reference = Counts(), Counts()
    assert ids_of(fast, texts, by_fast) == ids_of(reference, texts, by_reference)
    assert (by_fast.fast, by_fast.reference) == (len(texts), 0)
    assert by_fast.checked >= 1
    assert by_reference == Counts(reference=len(texts))
    assert make_encoder(data, "t").engine == "gigatoken"


@pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")
@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=8))
def test_random_unicode(byte_level: bytes, llama_like: bytes, texts: list[str]) -> None:
    for data in (byte_level, llama_like):
        fast, reference = (
            tokenization.encoder_for(data, Markers(), "gigatoken"),
            tokenization.encoder_for(data, Markers(), "tokenizers"),
        )
        assert ids_of(fast, texts) == ids_of(reference, texts)


@pytest.mark.parametrize("engine", ENGINES)
def test_text_full_of_control_tokens_never_becomes_one(data: bytes, engine: str) -> None:
    encoder = make_encoder(data, "t", engine=engine)
    rng = random.Random(0)
    texts = [" ".join(rng.choice([*CONTROL, *CRYSTALCODER_TOKENS, "word"]) for _ in range(40)) for _ in range(20)]
    for ids, text in zip(encoder.encode(texts, texts), texts, strict=True):
        assert not np.isin(ids, encoder.control_ids).any()
        assert encoder.decode(ids) == text


@pytest.mark.parametrize("engine", ENGINES)
def test_a_control_token_that_is_not_called_special_is_one_all_the_same(byte_level: bytes, engine: str) -> None:
    tree = json.loads(byte_level)
    for token in tree["added_tokens"]:
        token["special"] = token["content"] in ("<unk>", "<s>", "</s>")
    encoder = make_encoder(json.dumps(tree).encode(), "t", engine=engine)
    (ids,) = encoder.encode(["a <|fim_middle|> b"], ["x"])
    assert encoder.special_id("fim_middle") in encoder.control_ids
    assert not np.isin(ids, encoder.control_ids).any()


@pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")
def test_added_tokens_that_are_text_go_through_the_reference(byte_level: bytes) -> None:
    tree = json.loads(byte_level)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    number = max(token["id"] for token in tree["added_tokens"]) + 1
    tree["added_tokens"].append({"id": number, "content": "    "} | plain)
    data = json.dumps(tree).encode()
    encoder = make_encoder(data, "t", engine="gigatoken")
    texts = ["no runs of spaces", "four    spaces"]
    assert ids_of(encoder, texts) == ids_of(make_encoder(data, "t", engine="tokenizers"), texts)
    counts = Counts()
    assert number in ids_of(encoder, texts, counts)[1]
    assert (counts.fast, counts.reference) == (1, 1)


@pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")
def test_an_engine_that_errs_is_found(byte_level: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(byte_level, "t", engine="gigatoken")
    encode = engines.Gigatoken.encode

    def wrong(self: Any, texts: Any) -> Any:
        return [np.where(np.arange(len(ids)) == 3, ids + 1, ids) for ids in encode(self, texts)]

    monkeypatch.setattr(engines.Gigatoken, "encode", wrong)
    with pytest.raises(DataError, match=r"file:1: gigatoken .* and the reference differ from token 3"):
        encoder.encode(["one document that is long enough"], ["file:1"])


NEW_LETTERS = "\u088f\u0c5c\ua7ce\ua7f1\U00010940\U00011db0\U00016ea0\U0001e6c0\U0002b73a\U000323b0"  # of Unicode 17
LATE_MARKS = "\u07fd\u0898\u08ca\u09fe\u0c3c\u1abf\u1acd\u1df6"  # combining, of Unicode 10 to 14


@pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")
def test_what_unicode_added_lately_goes_through_the_reference(byte_level: bytes) -> None:
    """Each library brings the tables of another version: for letters of a pre-tokenizer's classes, for the order of
    combining marks.
    """
    tree = json.loads(byte_level) | {"normalizer": {"type": "NFC"}}
    vocab, merges = tree["model"]["vocab"], tree["model"]["merges"]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # a letter before another one becomes one token
    for lead in {bytes_of.pre_tokenize_str(letter)[0][0][0] for letter in NEW_LETTERS}:
        merges.append(["a", lead])
        vocab["a" + lead] = max(max(vocab.values()), *(token["id"] for token in tree["added_tokens"])) + 1
    data = json.dumps(tree).encode()
    fast, reference = make_encoder(data, "t", engine="gigatoken"), make_encoder(data, "t", engine="tokenizers")
    texts = (
        [f"a{letter}" for letter in NEW_LETTERS]
        + [f"e\u0301{mark}\u0323" for mark in LATE_MARKS]
        + ["e\u0301", "\u00e9", "plain"]
    )
    counts = Counts()
    assert ids_of(fast, texts, counts) == ids_of(reference, texts)
    assert counts.fast == 2
    alone = engines.open_gigatoken(json.loads(data))  # and it is not for nothing
    assert isinstance(alone, engines.Gigatoken)
    differing = [
        text
        for text, ids in zip(texts, alone.encode(texts), strict=True)
        if ids.tolist() != ids_of(reference, [text])[0]
    ]
    assert len(differing) >= 10


@pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")
def test_an_engine_that_stops_is_found(byte_level: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(byte_level, "t")

    def stops(self: Any, texts: Any) -> Any:
        raise RuntimeError("out of\nmerges")

    monkeypatch.setattr(engines.Gigatoken, "encode", stops)
    with pytest.raises(
        EnginesDifferError, match=r"in the texts from file:1 on: gigatoken .* stopped \(out of merges\); use --engine"
    ):
        encoder.encode(["one document"], ["file:1"])


def test_the_sample_is_chosen_by_content() -> None:
    texts = [str(number) for number in range(3000)]
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    chosen = tokenization._sample(texts, range(3000), hashes)
    assert 8 < len(chosen) < 50  # 2 of 256
    assert all(hashes[index][0] < 2 for index in chosen)
    assert tokenization._sample(texts, range(3000), None) == chosen
    few = tokenization._sample(texts[:2], range(2), hashes)
    assert len(few) == 1


def test_without_gigatoken_auto_takes_the_reference_and_says_why(
    byte_level: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "open_gigatoken", lambda tree, dtype: "it is not installed")
    encoder = make_encoder(byte_level, "t")
    assert (encoder.engine, encoder.engine_reason) == ("tokenizers", "it is not installed")
    with pytest.raises(
        DataError, match="gigatoken cannot encode with it: it is not installed; use --engine tokenizers"
    ):
        make_encoder(byte_level, "t", engine="gigatoken")


# -- long documents


def test_long_documents_are_cut_where_no_entry_spans_the_cut(llama_like: bytes) -> None:
    """Exact: the ids of the whole, from an encoder that does not cut; and the pieces are short."""
    tree = json.loads(llama_like)
    tree["added_tokens"] = []
    assert cutting_of(tree) is not None
    uncut = Tokenizer.from_str(json.dumps(tree))
    encoder = make_encoder(llama_like, "t", engine="tokenizers")
    code = "\n".join(library(30))
    for text in (
        code[:60_000],
        code.replace("\n", " ")[:60_000],
        "ab " * 9000,
        "x" * 20_000 + " y" * 9000,
        " " * 20_000,
        "a \u2581b" * 6000,
    ):
        assert ids_of(encoder, [text]) == [uncut.encode(text, add_special_tokens=False).ids]


def test_where_an_entry_spans_a_space_nothing_is_cut(llama_like: bytes) -> None:
    tree = json.loads(llama_like)
    tree["added_tokens"] = []
    tree["model"]["vocab"]["of\u2581the"] = 9000
    assert cutting_of(tree) is None
    plain = json.loads(llama_like)
    cutting = cutting_of(plain)
    assert cutting is not None
    assert cutting.may_cut("a <|fim_middle|> b")
    # text may become it, and after it begins anew
    plain["added_tokens"][-1] |= {"special": False, "content": "<place>"}
    cutting = cutting_of(plain)
    assert cutting is not None
    assert [cutting.may_cut(text) for text in ("a b", "a <place> b")] == [True, False]


@pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")
def test_gigatoken_encodes_long_texts_in_pieces_too(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(data, "t", engine="gigatoken")
    text = "\n".join(library(3))[:40_000]
    whole = ids_of(encoder, [text])
    monkeypatch.setattr(engines, "_BATCH_CHARACTERS", 1000)
    assert ids_of(encoder, [text]) == whole


@pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")
def test_of_a_long_text_the_beginning_is_compared(byte_level: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = engines.Reference.encode
    monkeypatch.setattr(
        engines.Reference, "encode", lambda self, texts: (encoded.extend(map(len, texts)), encode(self, texts))[1]
    )
    encoder = make_encoder(byte_level, "t", engine="gigatoken")
    counts = Counts()
    encoder.encode(["some words " * 20_000], ["x"], None, counts)
    assert (encoded, counts.checked) == ([1 << 16], 1)


def test_both_spellings(byte_level: bytes) -> None:
    encoder = make_encoder(byte_level, "t")
    other = make_encoder(byte_level.replace(b"<|fim_", b"<fim_").replace(b"prefix|>", b"prefix>"), "t")
    assert encoder.special_id("fim_prefix") == other.special_id("fim_prefix")
    assert encoder.special_id("fim_nothing") is None
    assert "<|fim_middle|>" in encoder.special_tokens()
