"""The text of ids without white space: the table's bytes are those of the tokenizer's own decode."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from weftrain.data_prep.tokens.compact_text import compact_table
from weftrain.data_prep.tokens.tokenization import TextEncoder, make_encoder

PIECES = ["▁", "the", "▁weft", "é", "▁▁", "a long piece of some thirty bytes", "、", "\t", "x▁y"]


def llama_like() -> TextEncoder:
    """A SentencePiece-like BPE with byte fallback, as Llama 2's: no merges, so text is characters and bytes."""
    vocab = {
        token: index
        for index, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES])
    }
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return make_encoder(tokenizer.to_str().encode(), "t", engine="tokenizers")


LLAMA = llama_like()


def slow(encoder: TextEncoder, ids: np.ndarray) -> str:
    """By the tokenizer's own decode."""
    return encoder.decode(ids[~np.isin(ids, encoder.control_ids)])


def without_space(text: str) -> str:
    return "".join(character for character in text if not (character.isascii() and character.isspace()))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_ids_are_decoded_as_the_tokenizer_does(encoder: TextEncoder, data: st.DataObject) -> None:
    for chosen in (encoder, LLAMA):
        assert chosen._compact is not None
        ids = np.array(data.draw(st.lists(st.integers(0, chosen.vocab_size - 1), max_size=30)), np.int32)
        expected = slow(chosen, ids)
        if "\ufffd" not in expected:  # ids that are no text have some side, whichever
            assert chosen.compact_utf8(ids).decode() == without_space(expected)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=40))
def test_a_texts_ids_are_the_text(encoder: TextEncoder, text: str) -> None:
    for chosen in (encoder, LLAMA):
        (ids,) = chosen.encode([text], ["x"])
        data = chosen._compact.utf8(ids)  # type: ignore[union-attr]
        if "▁" not in text:  # which Llama's tokenizer takes for a space
            assert data.decode() == without_space(text)


@pytest.mark.parametrize(
    "decoder", [None, {"type": "WordPiece", "prefix": "##"}, {"type": "Sequence", "decoders": [{"type": "Replace"}]}]
)
def test_other_decoders_have_no_table(decoder: object) -> None:
    assert compact_table(decoder, {0: "a"}, 1) is None


def test_a_tokenizer_without_a_table() -> None:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "loom": 1, "we": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = make_encoder(tokenizer.to_str().encode(), "t")
    assert encoder.compact_utf8(np.array([2, 1, 0])) == b"weloom"
