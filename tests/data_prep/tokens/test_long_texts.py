"""Long texts are cut only where the ids stay those of the whole: for the pre-tokenizers and normalizers of published
tokenizers.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from weftrain.data_prep.tokens import engines
from weftrain.data_prep.tokens.long_texts import SPACE, alternatives, cutting_of
from weftrain.data_prep.tokens.tokenization import make_encoder

# LLaMA 3's
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEGIN, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"{_BEGIN}{_UPPER}*{_LOWER}+{_ENDING}|{_BEGIN}{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(*patterns: str, behavior: str = "isolated", invert: bool = False) -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), behavior, invert) for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TEXT: dict[str, tuple[Any, Any]] = {
    "GPT-2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "with a space before": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "LLaMA 3": (normalizers.NFC(), split(CL100K)),
    "inverted": (None, split(CL100K, behavior="removed", invert=True)),
    "o200k": (normalizers.NFC(), split(O200K)),
    "DeepSeek": (None, split(r"\p{N}{1,3}", DEEPSEEK)),
    "StarCoder": (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]),
    ),
    "BERT": (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "words": (normalizers.Lowercase(), pre_tokenizers.Whitespace()),
    "Mistral": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "T5": (
        normalizers.Sequence([normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), SPACE)]),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
    ),
    "XLM": (
        normalizers.NFKC(),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
    ),
}
PIECES = [
    "a",
    "B",
    "the",
    "12",
    "1234",
    "'s",
    "'S ",
    "'",
    '"',
    ".",
    "...",
    "/",
    "\n",
    "\r\n",
    " ",
    "  ",
    "\t",
    "\u3000",
    "\u00a0",
]
PIECES += [
    "\u00e9",
    "e\u0301",
    "\u0301",
    "\u0338",
    "\u65e5\u672c",
    "\u3002",
    "\uac00",
    "\u11a8",
    "\u0661",
    "_",
    "\u2581",
    "x y",
    "= ",
    "\U0001f600",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


def tree_of(name: str) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", vocab={"<unk>": 0}, merges=[]))
    normalizer, tokenizer.pre_tokenizer = TEXT[name]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    value: dict[str, Any] = json.loads(tokenizer.to_str())
    return value


@pytest.mark.parametrize("name", TEXT)
@settings(deadline=None, max_examples=80)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6), length=st.integers(1, 6))
def test_words_are_those_of_the_whole(name: str, texts: list[str], length: int) -> None:
    """The model sees word after word, so the words decide."""
    cutting = cutting_of(tree_of(name))
    assert cutting is not None
    normalizer, splitter = TEXT[name]

    def words(text: str) -> list[str]:
        normal = text if normalizer is None else normalizer.normalize_str(text)
        return [word for word, _ in splitter.pre_tokenize_str(normal)] if normal else []

    for text in texts:
        pieces = list(cutting.pieces(text, length))
        assert "".join(pieces) == text
        assert [word for piece in pieces for word in words(piece)] == words(text)


@pytest.mark.parametrize("name", TEXT)
def test_there_are_places_to_cut(name: str) -> None:
    cutting = cutting_of(tree_of(name))
    assert cutting is not None
    assert max(map(len, cutting.pieces("Some words, and more of them. " * 50, 20))) < 60


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(
        st.lists(st.sampled_from([*PIECES, "run    ", "caf", "  in"]), max_size=30).map("".join), min_size=1, max_size=6
    ),
    length=st.integers(1, 6),
    flags=st.sampled_from([{}, {"lstrip": True, "rstrip": True}, {"single_word": True}]),
    normalized=st.booleans(),
    form=st.sampled_from([None, normalizers.NFC()]),
)
def test_added_tokens_are_met_as_in_the_whole(
    texts: list[str], length: int, flags: dict[str, bool], normalized: bool, form: Any
) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={}, merges=[]))
    if form is not None:
        tokenizer.normalizer = form
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer.model = models.BPE(vocab=alphabet, merges=[])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    contents = ("  ", "   ", "\u00e9", "the", " x", "a\n")
    tokenizer.add_tokens([AddedToken(content, special=False, normalized=normalized, **flags) for content in contents])
    cutting = cutting_of(json.loads(tokenizer.to_str()))
    assert cutting is not None
    for text in texts:
        pieces = list(cutting.pieces(text, length))
        assert [number for piece in pieces for number in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": r"\p{L}+ \p{L}+|\s+"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            "spans",
        ),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "looks back"),
        (
            {"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}},
            "splits nothing",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                }
            },
            "splits nothing",
        ),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": False}}, "drops the space"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "ab"}}, "spans"),
        ({"pre_tokenizer": None}, "one word"),
    ],
)
def test_what_is_not_known_to_be_exact_is_not_cut(change: dict[str, Any], why: str) -> None:
    assert cutting_of(tree_of("GPT-2") | change) is None, why


def test_alternatives_of_a_pattern() -> None:
    assert alternatives(r"'s|[^|\]]?a+|(?i:b|c)|\|") == ["'s", r"[^|\]]?a+", "(?i:b|c)", r"\|"]


def test_a_text_without_a_place_to_cut_is_refused_beyond_a_stated_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_WHOLE_CHARACTERS", 5000)
    monkeypatch.setattr(engines, "_BATCH_CHARACTERS", 2000)
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "word": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = make_encoder(tokenizer.to_str().encode(), "t", engine="tokenizers")
    good, bad = encoder.encode_each(["word " * 4000, "word " * 400 + "x" * 6000], ["a", "b"])
    assert not isinstance(good, str)
    assert good.tolist() == [2] * 4000
    assert isinstance(bad, str)
    assert "of its 8,000 characters 8,000 have no place where this tokenizer's ids would not depend on a cut" in bad
    assert bad.endswith("encodes at most 5,000 at once; split the document")
