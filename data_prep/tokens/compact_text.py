"""The text of token ids without ASCII white space, as UTF-8, which held-out rule 2 hashes of tokenised documents.

Where each token stands for bytes of its own (byte-level BPE, SentencePiece with byte fallback), the bytes come from a
table, at about 30 ns per token. The tokenizer's own `decode` takes 100 ns, and is used for all others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from weftrain.data_prep.heldout import ASCII_SPACE

_WIDTH = 16  # bytes of a token in the table; the few longer ones are put in one by one
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class CompactTable:
    """Bytes of each id. Control ids and unused ids have none."""

    def __init__(self, of_id: Mapping[int, bytes], size: int) -> None:
        self._long = {index: data for index, data in of_id.items() if len(data) > _WIDTH}
        self._is_long = np.zeros(size, np.bool_)
        self._is_long[list(self._long)] = True
        short = (b"" if index in self._long else of_id.get(index, b"") for index in range(size))
        fixed = b"".join(data.ljust(_WIDTH) for data in short)
        self._table = np.frombuffer(fixed, f"V{_WIDTH}")

    def utf8(self, ids: np.ndarray) -> bytes:
        """Bytes of ids [n] without ASCII white space. Not always UTF-8: ids may begin or end within a character."""
        parts: list[bytes] = []
        start = 0
        for place in np.flatnonzero(self._is_long[ids]).tolist():
            parts += [self._table[ids[start:place]].tobytes(), self._long[int(ids[place])]]
            start = place + 1
        parts.append(self._table[ids[start:]].tobytes())
        return b"".join(parts).translate(None, ASCII_SPACE)


def compact_table(decoder: Any, tokens: Mapping[int, str], size: int) -> CompactTable | None:
    """The table of a tokenizer with this `decoder`; None where a token's text depends on its neighbours. tokens: those
    that have text. size: one more than the largest id.
    """
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return CompactTable({index: _byte_level(token) for index, token in tokens.items()}, size)
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    stripped = not kinds[3:] or (kinds[3:] == ["Strip"] and steps[3].get("content") == " ")
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == spaces and stripped:
        return CompactTable({index: _byte_fallback(token) for index, token in tokens.items()}, size)
    return None


def _byte_level(token: str) -> bytes:
    """A token of a byte-level vocabulary, or an added one that is spelled in other characters."""
    found = [_BYTES.get(character) for character in token]
    return token.encode() if None in found else bytes(byte for byte in found if byte is not None)


def _byte_fallback(token: str) -> bytes:
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token.replace("▁", " ").encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: the printable ones of Latin-1 for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_characters()
