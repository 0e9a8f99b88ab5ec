"""Which documents are held out: decided by a document's content alone, so that a copy of it elsewhere stands on the same side.

Rule 2 hashes the text without its white space, in NFC. A copy with other line ends, an added newline or trailing blanks has the same
hash, and so has a copy that was tokenised, of which the decoded ids are hashed. Rule 1, of datasets that record none, hashes the bytes of
the text, or of the ids. A document is held out if its hash lies below the fraction, so what is held out at one fraction is held out at any
larger one.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Protocol

import numpy as np

from weftrain.data_prep.documents import Document

RULE = 2
_ASCII_SPACE = bytes((*range(9, 14), *range(28, 33)))
# Unicode's White_Space beyond ASCII, and the byte order mark.
_OTHER_SPACE = "\x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000\ufeff"
# NFC sorts each run of combining marks in quadratic time. No language writes so many, and a text that does is hashed as it is.
_MANY_MARKS = re.compile(r"[^\w\x00-\x7f]{257}")


class Decoder(Protocol):
    """What rule 2 needs of a tokenizer."""

    def text_of(self, ids: np.ndarray) -> str:
        """The text of ids without control ids."""


def text_hash(text: str) -> bytes:
    """Rule 2's SHA-256: of the text without white space (ASCII, Unicode, byte order mark), in NFC, as UTF-8.

    White space goes first, for NFC composes across a place where some was.
    """
    if text.isascii():
        return hashlib.sha256(text.encode().translate(None, _ASCII_SPACE)).digest()
    for space in _OTHER_SPACE:
        if space in text:
            text = text.replace(space, "")
    data = text.encode().translate(None, _ASCII_SPACE)
    compact = data.decode()
    if not unicodedata.is_normalized("NFC", compact) and not _MANY_MARKS.search(compact):
        data = unicodedata.normalize("NFC", compact).encode()
    return hashlib.sha256(data).digest()


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
    return text_hash(decoder.text_of(document.tokens))


def _is_below(owner: bytes, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(b"heldout " + owner).digest()[:8]) < fraction * 2.0**64
