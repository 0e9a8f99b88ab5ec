"""The two engines that turn text into ids: Hugging Face `tokenizers` and `gigatoken`. Neither makes a control token of text.

What a reader would get wrong: a tokenizer without a pre-tokenizer, as LLaMA's, takes a whole document for one word, and its cost a byte
grows with the document's length. Long documents are cut where no vocabulary entry can span the cut: merges only ever make vocabulary
entries, so the ids are those of the whole.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from weftrain.core.tokenizer_file import is_panic
from weftrain.data_prep.added_tokens import may_hold_added_token, normalizers_of
from weftrain.data_prep.new_characters import has_new_character
from weftrain.data_prep.packing import split

_SPACE = "\u2581"  # what LLaMA-like normalizers write for a space
MISSING = "it is not installed: pip install 'weftrain[data]'"
_PIECE_CHARACTERS = 4096
_PLAIN_NORMALIZERS = ("Prepend", "Replace")  # no table of Unicode is asked
_LONG_CHARACTERS = 4 * _PIECE_CHARACTERS
_FRESH_BYTES = 256 << 20  # gigatoken keeps what it has seen: after so much text it starts anew, which takes a tenth of a second


class Reference:
    """Hugging Face tokenizers, on all threads that it is given. tree: the contents of a tokenizer.json."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tokenizer = _tokenizer(tree)
        self._continuing = _tokenizer(_without_prepend(tree)) if can_be_cut(tree) else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64."""
        whole = [text if self._continuing is None or len(text) <= _LONG_CHARACTERS else None for text in texts]
        short = [text for text in whole if text is not None]
        encoded = iter(self._tokenizer.encode_batch_fast(short, add_special_tokens=False)) if short else iter(())
        return [
            np.array(next(encoded).ids, dtype=np.int64) if kept is not None else self._encode_long(text)
            for kept, text in zip(whole, texts, strict=True)
        ]

    def _encode_long(self, text: str) -> np.ndarray:
        assert self._continuing is not None
        first, *rest = cut_pieces(text)
        ids = [self._tokenizer.encode(first, add_special_tokens=False).ids]
        ids += [piece.ids for piece in self._continuing.encode_batch_fast(rest, add_special_tokens=False)]
        return np.concatenate([np.array(piece, dtype=np.int64) for piece in ids])


def _tokenizer(tree: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.encode_special_tokens = True  # spells them out
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def can_be_cut(tree: dict[str, Any]) -> bool:
    """Whether a document may be cut before a space that follows something else.

    So it is for BPE that writes a space as one character, has no pre-tokenizer, and no entry with that character after another one.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    kinds = [normalizer if normalizer["type"] != "Prepend" else "Prepend" for normalizer in normalizers_of(tree)]
    if tree.get("pre_tokenizer") is not None or tree["model"]["type"] != "BPE" or kinds not in (["Prepend", replace], [replace]):
        return False
    spans = re.compile(f"[^{_SPACE}]{_SPACE}")
    only_control = all(token["special"] for token in tree.get("added_tokens") or [])
    return only_control and not any(spans.search(token) for token in tree["model"]["vocab"])


def _without_prepend(tree: dict[str, Any]) -> dict[str, Any]:
    kept = [normalizer for normalizer in normalizers_of(tree) if normalizer["type"] != "Prepend"]
    return tree | {"normalizer": {"type": "Sequence", "normalizers": kept}}


def cut_pieces(text: str) -> list[str]:
    """A text in pieces of some thousand characters, each but the first beginning with a space that follows something else."""
    pieces, start = [], 0
    while True:
        cut = text.find(" ", start + _PIECE_CHARACTERS)
        while cut > 0 and text[cut - 1] in (" ", _SPACE):
            cut = text.find(" ", cut + 1)
        if cut < 0:
            pieces.append(text[start:])
            return pieces
        pieces.append(text[start:cut])
        start = cut


def gigatoken_problem(tree: dict[str, Any]) -> str | None:
    """Why gigatoken cannot encode with this tokenizer, or None."""
    try:
        from gigatoken.gigatoken_rs import load_hf_json
    except ImportError:
        return MISSING
    try:
        load_hf_json(json.dumps(tree | {"added_tokens": []}))
    except BaseException as error:  # the library raises several kinds, and panics
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


class Gigatoken:
    """gigatoken on the calling thread, since processes share the work. tree: the contents of a tokenizer.json.

    It is given no added token at all, for it would match them in text; texts that may hold one that text may become need the reference.
    """

    def __init__(self, tree: dict[str, Any]) -> None:
        self._data = json.dumps(tree | {"added_tokens": []})
        self._tests = _reference_tests(tree)
        self._encoded_bytes = 0
        self._backend = self._load()

    def _load(self) -> Any:
        from gigatoken.gigatoken_rs import load_hf_json

        return load_hf_json(self._data)

    def needs_reference(self, text: str) -> bool:
        """Whether the engines need not agree about a text."""
        return any(test(text) for test in self._tests)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32."""
        if not texts:
            return []
        layout = self._backend.encode_batch(list(texts), parallel=False).layout
        offsets, ids = np.asarray(layout.offsets.data), np.asarray(layout.content.data)
        self._encoded_bytes += sum(map(len, texts))
        if self._encoded_bytes > _FRESH_BYTES:
            self._backend, self._encoded_bytes = self._load(), 0
        return split(ids[offsets[0] :], offsets[1:] - offsets[0])


def _reference_tests(tree: dict[str, Any]) -> list[Callable[[str], bool]]:
    """Each finds texts about which the engines need not agree.

    These may hold an added token; or a character that one library's version of Unicode does not know, where a class of characters or a
    normalizer decides; or they are not normalised yet. The reference's tables for the latter are so old (combining marks of Unicode 11
    and later have no class there) that only text that stays as it is has the same form in both.
    """
    tests = [test] if (test := may_hold_added_token(tree)) is not None else []
    for normalizer in normalizers_of(tree):
        kind = normalizer["type"]
        if kind in ("NFC", "NFD", "NFKC", "NFKD"):
            tests.append(functools.partial(_is_changed, kind))
        elif kind not in _PLAIN_NORMALIZERS:
            tests.append(lambda text: not text.isascii())
    splits = tree.get("pre_tokenizer") is not None and tree["pre_tokenizer"]["type"] != "Metaspace"
    if splits or any(normalizer["type"] not in _PLAIN_NORMALIZERS for normalizer in normalizers_of(tree)):
        tests.append(has_new_character)
    return tests


def _is_changed(form: Any, text: str) -> bool:
    return not text.isascii() and not unicodedata.is_normalized(form, text)
