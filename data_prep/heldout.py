"""Which documents are held out: decided by a document's content alone, so that a copy of it elsewhere stands on the
same side.

Rule 2 hashes the text without its white space, in NFC. A copy with other line ends, an added newline or trailing blanks
has the same hash, and so has a copy that was tokenised, of which the decoded ids are hashed. Rule 1, of datasets that
record none, hashes the bytes of the text, or of the ids. A document is held out if its hash lies below the fraction, so
what is held out at one fraction is held out at any larger one.
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
    """Rule 2's SHA-256: of the text without white space (ASCII, Unicode, byte order mark), in NFC, as UTF-8.

    White space goes first, for NFC composes across a place where some was. A long text is hashed a piece at a time.
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
    """A text cut before characters that NFC never joins to what precedes them, nor any mark run reaches across: letters
    and digits.
    """
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
    """Whether a document is held out: by its content, or that of the text that it belongs to, and nothing else.

    content: SHA-256 of its bytes, or of its ids where it came tokenised, in which case `decoder` is needed.
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
