"""SentencePiece models give SentencePiece's own ids, or are refused with a remedy."""

from __future__ import annotations

import io
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.tokens import sentencepiece_model
from weftrain.data_prep.tokens.tokenization import load_encoder

LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
ACCEPTED: dict[str, dict[str, Any]] = {
    "LLaMA's": {"model_type": "bpe", "allow_whitespace_only_pieces": True, "split_digits": True, **LLAMA},
    "Gemma's": {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<x>", "\u2581\u2581", "\n"],
        **LLAMA,
    },
    "BPE, NFKC": {"model_type": "bpe"},
    "T5's": {"model_type": "unigram"},
    "Unigram with bytes": {"model_type": "unigram", **LLAMA},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "characters": ({"model_type": "char"}, "of words or characters has no counterpart"),
    "suffix": ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "white space as a suffix"),
    "user-defined after a space": (
        {"model_type": "bpe", "user_defined_symbols": ["<x>"], **LLAMA},
        "for ' ' token 1 differs of 2",
    ),
}


def lines(first: int, last: int) -> list[str]:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[first:last]
    return [line for path in paths for line in path.read_text().split("\n") if line.strip()]


@pytest.fixture(scope="module")
def spm() -> Any:
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="sentencepiece is not installed")
    return pytest.importorskip("sentencepiece")


def trained(spm: Any, options: dict[str, Any]) -> bytes:
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines(0, 8)[:2000]),
        model_writer=made,
        vocab_size=500,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return made.getvalue()


@pytest.mark.parametrize("name", ACCEPTED)
def test_ids_are_sentencepieces_own(spm: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained(spm, ACCEPTED[name]))
    encoder = load_encoder(path, engine="tokenizers")
    original = spm.SentencePieceProcessor(model_proto=path.read_bytes())
    assert json.loads(encoder.data)["model"]["type"] in ("BPE", "Unigram")  # what a dataset keeps is a tokenizer.json
    assert encoder.data == load_encoder(path).data
    assert encoder.eos_id == original.eos_id()
    texts = [*lines(20, 24)[:400], "  x <x> y\n\n<x>", "\u65e5\u672c \U0001f600", ""]
    for text, ids in zip(texts, encoder.encode(texts, texts), strict=True):
        assert ids.tolist() == original.encode(text)
    names = ["a </s> b", "<unk>", "<0x41>"]
    for text, result in zip(names, encoder.encode_each(names, names), strict=True):
        assert isinstance(result, str) or result.tolist() == original.encode(text)
        assert isinstance(result, str) == (
            ACCEPTED[name]["model_type"] == "unigram" and (text != "<0x41>" or "byte_fallback" in ACCEPTED[name])
        )


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_counterpart_is_refused(spm: Any, tmp_path: Path, name: str) -> None:
    options, message = REFUSED[name]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained(spm, options))
    with pytest.raises(DataError, match=rf"^{path}: .*{message}.*: give the tokenizer\.json of the same tokenizer$"):
        load_encoder(path)


def test_ids_that_differ_are_found(spm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained(spm, ACCEPTED["LLaMA's"]))
    merges = sentencepiece_model._merges
    monkeypatch.setattr(sentencepiece_model, "_merges", lambda pieces: merges(pieces)[:-3])
    with pytest.raises(
        DataError, match=r"tokenizers cannot reproduce this SentencePiece model: for .* token .* differs of"
    ):
        load_encoder(path)


def test_a_file_that_is_no_model(spm: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for data in (b"", b"IQ== 0\nIg== 1\n", b"\x00" * 50):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"^{path}: is no SentencePiece model \(.*\): give the tokenizer\.json"):
            load_encoder(path)


def test_without_its_library_a_model_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x00")
    with pytest.raises(
        DataError, match=r"needs its library: pip install 'weftrain\[sentencepiece\]'; or give the tokenizer\.json"
    ):
        load_encoder(tmp_path / "tokenizer.model")
