"""Which documents are held out: a function of their content alone, so that copies of a text are on the same side.

Rule 2 hashes the text without white space, in NFC: copies with other line ends or trailing blanks have the same hash,
and so have tokenised copies, whose ids are decoded. Rule 1, used by datasets that record none, hashes the bytes of the
text or of the ids. A document is held out if its hash lies below the fraction, so a larger fraction holds out a
superset.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from weftrain.data_prep.readers.documents import Document
from weftrain.data_prep.readers.normalisation import unicode_form

RULE = 2
ASCII_SPACE = bytes((*range(9, 14), *range(28, 33)))
# Unicode's White_Space beyond ASCII, and the byte order mark.
_OTHER_SPACE = "\x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000\ufeff"
_PIECE_CHARACTERS = 1 << 20
_STARTER = re.compile(r"[^\W_\u1160-\u11ff\ud7b0-\ud7ff]")  # the jamo that follow others are letters, and join them


class Decoder(Protocol):
    """What rule 2 needs of a tokenizer."""

    def compact_utf8(self, ids: np.ndarray) -> bytes:
        """The text of ids without control ids and ASCII white space, as UTF-8."""


def text_hash(text: str) -> bytes:
    """SHA-256 of rule 2: the text without white space (ASCII, Unicode, byte order mark), in NFC, as UTF-8. White space
    is removed first, because NFC may then compose across it. Long texts are hashed in pieces.
    """
    digest, in_nfc = hashlib.sha256(), True
    for piece in _pieces(text):
        data = _without_space(piece)
        digest.update(data)
        in_nfc = in_nfc and (piece.isascii() or unicodedata.is_normalized("NFC", data.decode()))
    if in_nfc:
        return digest.digest()
    digest = hashlib.sha256()
    for piece in _pieces(text):
        digest.update(unicode_form("NFC", _without_space(piece).decode()).encode())
    return digest.digest()


def _pieces(text: str) -> Iterator[str]:
    """A text cut before letters and digits that NFC never joins to what precedes them."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        found = _STARTER.search(text, start + _PIECE_CHARACTERS)
        stop = len(text) if found is None else found.start()
        yield text[start:stop]
        start = stop
    yield text[start:]


def _without_space(text: str) -> bytes:
    if not text.isascii():
        for space in _OTHER_SPACE:
            if space in text:
                text = text.replace(space, "")
    return text.encode().translate(None, ASCII_SPACE)


def is_held_out(document: Document, content: bytes, rule: int, fraction: float, decoder: Decoder | None = None) -> bool:
    """Whether a document is held out, by its own content or by that of the text it belongs to. content: SHA-256 of its
    bytes, or of the ids of a tokenised document, which needs `decoder`.
    """
    return bool(fraction) and _is_below(_owner(document, content, rule, decoder), fraction)


def _owner(document: Document, content: bytes, rule: int, decoder: Decoder | None) -> bytes:
    if document.belongs_to is not None:
        return text_hash(document.belongs_to) if rule == 2 else hashlib.sha256(document.belongs_to.encode()).digest()
    if rule == 1:
        return content
    if document.tokens is None:
        return text_hash(document.text or "")
    assert decoder is not None
    data = decoder.compact_utf8(document.tokens)
    return hashlib.sha256(data).digest() if data.isascii() else text_hash(data.decode())


def _is_below(owner: bytes, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(b"heldout " + owner).digest()[:8]) < fraction * 2.0**64
