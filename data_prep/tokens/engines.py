"""The two engines that turn text into ids: Hugging Face `tokenizers` and `gigatoken`. Neither makes text a control
token.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from weftrain.core.errors import one_line
from weftrain.core.formats.tokenizer_file import is_panic
from weftrain.data_prep.tokens.added_tokens import may_hold_added_token, normalizers_of
from weftrain.data_prep.tokens.long_texts import cutting_of
from weftrain.data_prep.tokens.new_characters import has_new_character
from weftrain.data_prep.tokens.proven_shapes import not_proven

MISSING = "it is not installed: pip install 'weftrain[data]'"
_PIECE_CHARACTERS = 4096  # of a long text
_PLAIN_NORMALIZERS = ("Prepend", "Replace")  # no table of Unicode is asked
_BATCH_CHARACTERS = 1 << 20  # encoded at once, for which the reference needs some 130 MiB
_WHOLE_CHARACTERS = 4 << 20
_DTYPE: np.dtype[Any] = np.dtype(np.uint32)
# gigatoken keeps the words it has seen, up to 2 bytes for each of text: after so much it is opened anew
_FRESH_BYTES = 128 << 20


class Reference:
    """Hugging Face tokenizers, on all threads available. tree: tokenizer.json; opened: the same, opened. Memory is
    bounded: about a megabyte of text is encoded at once, and long texts in pieces where that is exact (long_texts.py).
    """

    def __init__(self, tree: dict[str, Any], dtype: np.dtype[Any] = _DTYPE, opened: Tokenizer | None = None) -> None:
        self._tree, self._dtype = tree, dtype
        self._tokenizer = _tokenizer(tree) if opened is None else _spelling_out(opened)
        self._cutting = cutting_of(tree)
        self._continuing: Tokenizer | None = None
        # Without a pre-tokenizer a text is one word, whose cost a byte grows with its length.
        self._most_characters = 4 * _PIECE_CHARACTERS if tree.get("pre_tokenizer") is None else _BATCH_CHARACTERS

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        short = [text for text in texts if len(text) <= self._most_characters]
        encoded = (ids for batch in _batches(short) for ids in _ids(self._tokenizer, batch, self._dtype))
        return [next(encoded) if len(text) <= self._most_characters else self._encode_long(text) for text in texts]

    def _encode_long(self, text: str) -> np.ndarray:
        cutting = self._cutting if self._cutting is not None and self._cutting.may_cut(text) else None
        pieces = iter([text]) if cutting is None else cutting.pieces(text, _PIECE_CHARACTERS)
        ids = _ids(self._tokenizer, [_short(next(pieces), text)], self._dtype)
        for batch in _batches(pieces):
            assert cutting is not None
            if self._continuing is None:
                self._continuing = (
                    self._tokenizer if cutting.continuing is self._tree else _tokenizer(cutting.continuing)
                )
            ids += _ids(self._continuing, [_short(piece, text) for piece in batch], self._dtype)
        return np.concatenate(ids)


class TextTooLongError(Exception):
    """A text that the reference could only encode as a whole, using memory proportional to its length."""


def _short(piece: str, text: str) -> str:
    if len(piece) > _WHOLE_CHARACTERS:
        raise TextTooLongError(
            f"of its {len(text):,} characters {len(piece):,} have no place where this tokenizer's ids would not depend "
            "on a cut, and the "
            f"reference engine encodes at most {_WHOLE_CHARACTERS:,} at once; split the document"
        )
    return piece


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in batches of a bounded number of characters; a longer text alone."""
    batch: list[str] = []
    length = 0
    for text in texts:
        if batch and length + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
        batch.append(text)
        length += len(text)
    if batch:
        yield batch


def _ids(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
    return [np.array(encoding.ids, dtype) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _tokenizer(tree: dict[str, Any]) -> Tokenizer:
    return _spelling_out(Tokenizer.from_str(json.dumps(tree)))


def _spelling_out(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def open_gigatoken(tree: dict[str, Any], dtype: np.dtype[Any] = _DTYPE) -> Gigatoken | str:
    """gigatoken with a tokenizer.json's contents, or why it cannot be used."""
    try:
        from gigatoken.gigatoken_rs import load_hf_json
    except ImportError:
        return MISSING
    if (setting := not_proven(tree)) is not None:
        return f"it may encode otherwise than the reference: {setting}"

    def load(tree: dict[str, Any]) -> Any:
        return load_hf_json(json.dumps(tree | {"added_tokens": []}))

    try:
        return Gigatoken(tree, load, dtype)
    except BaseException as error:  # the library raises several kinds, and panics
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        return one_line(error, 200)


class Gigatoken:
    """gigatoken on the calling thread, since processes share the work. tree: tokenizer.json. load: opens such a tree.
    It is given no added tokens, because it would match them in text; texts that may contain one need the reference.
    """

    def __init__(self, tree: dict[str, Any], load: Callable[[dict[str, Any]], Any], dtype: np.dtype[Any]) -> None:
        self._tree, self._load, self._dtype = tree, load, dtype
        self._backend = load(tree)
        self._tests = _reference_tests(tree)
        self._cutting = cutting_of(tree)
        self._encoded_bytes = 0

    def needs_reference(self, text: str) -> bool:
        """Whether the engines might disagree about a text."""
        return any(test(text) for test in self._tests)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32, or in dtype for a long one."""
        # encode_batch forgets the words it has seen, and is a third slower.
        encoded = [
            self._backend.encode(text) if len(text) <= _BATCH_CHARACTERS else self._encode_long(text) for text in texts
        ]
        self._encoded_bytes += sum(map(len, texts))
        if self._encoded_bytes > _FRESH_BYTES:
            self._backend, self._encoded_bytes = self._load(self._tree), 0
        return encoded

    def _encode_long(self, text: str) -> np.ndarray:
        """In pieces where the text may be cut, because the library makes several copies."""
        cutting = self._cutting
        if cutting is None or not cutting.may_cut(text):
            return np.asarray(self._backend.encode(text))
        pieces = cutting.pieces(text, _BATCH_CHARACTERS)
        ids = [self._backend.encode(next(pieces)).astype(self._dtype)]
        continuing = self._backend if cutting.continuing is self._tree else self._load(cutting.continuing)
        return np.concatenate([*ids, *(continuing.encode(piece).astype(self._dtype) for piece in pieces)])


def _reference_tests(tree: dict[str, Any]) -> list[Callable[[str], bool]]:
    """Tests for texts on which the engines might disagree.

    These may contain an added token; a character that is new to one library's Unicode tables, where classes or a
    normalizer matter; or text that is not normalised yet: the reference's tables are so old that only text which is
    already normalised has the same form in both.
    """
    tests: list[Callable[[str], bool]] = []
    for normalizer in normalizers_of(tree):
        kind = normalizer["type"]
        if kind in ("NFC", "NFD", "NFKC", "NFKD"):
            tests.append(functools.partial(_is_changed, kind))
        elif kind not in _PLAIN_NORMALIZERS:
            tests.append(lambda text: not text.isascii())
    splits = tree.get("pre_tokenizer") is not None and tree["pre_tokenizer"]["type"] != "Metaspace"
    if splits or any(normalizer["type"] not in _PLAIN_NORMALIZERS for normalizer in normalizers_of(tree)):
        tests.append(has_new_character)
    if (test := may_hold_added_token(tree)) is not None:
        tests.append(test)  # last, as it may have to normalise the text
    return tests


def _is_changed(form: Any, text: str) -> bool:
    return not text.isascii() and not unicodedata.is_normalized(form, text)
