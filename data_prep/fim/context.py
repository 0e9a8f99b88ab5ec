"""Fill-in-the-middle by context: each document's piece in a row is drawn and transformed by itself.

Documents are laid into rows one after the other. A document that does not fit the rest of a row, with its three control
tokens, is cut there and continues in the next row as a piece of its own. So no row overflows, no token is lost, each
transformed piece lies in one row, and (mode, a, b) restores it. The draw is a function of seed, document hash, epoch,
start and length.

Source: Bavarian et al. (2022), section 4, "context-level FIM", and StarCoder's training code, which cuts rows first and
loses what the control tokens push out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from weftrain.data_prep.fim import exact as fim
from weftrain.data_prep.tokens.markers import FimIds


@dataclass(frozen=True)
class Draws:
    """What decides each draw."""

    seed: int
    epoch: int
    rate: float
    spm_share: float


class ContextPiece(NamedTuple):
    """Own tokens start..stop-1 of a document, cut by (mode, a, b) from `start`. begins, ends: with bos, with eos."""

    document: int
    start: int
    stop: int
    mode: int
    a: int
    b: int
    begins: bool
    ends: bool

    def length(self, bos: int, eos: int) -> int:
        """Tokens in the row. bos, eos: tokens around a document, 0 or 1."""
        sentinels = fim.NUM_SENTINELS if self.mode != fim.PLAIN else 0
        return self.begins * bos + sentinels + self.stop - self.start + self.ends * eos


def context_pieces(
    lengths: Sequence[int], contents: Sequence[bytes], width: int, draws: Draws, bos: int, eos: int, *, together: bool
) -> list[ContextPiece]:
    """The pieces, each at most `width` long, of documents with these numbers of own tokens, in order. together: the
    pieces in sequence fill rows of `width`. Else each document begins a row, and the caller packs the pieces.
    """
    pieces: list[ContextPiece] = []
    left = width
    for document, (length, content) in enumerate(zip(lengths, contents, strict=True)):
        left = left if together else width
        for piece in _document(document, length, content, width, left, draws, bos, eos):
            pieces.append(piece)
            left -= piece.length(bos, eos)
            left = left or width
    return pieces


def _document(
    document: int, length: int, content: bytes, width: int, left: int, draws: Draws, bos: int, eos: int
) -> Iterator[ContextPiece]:
    """One document's pieces. left: tokens left in the row where it begins, at least 1."""
    start, begins = 0, True
    while True:
        head = bos if begins else 0
        mode, first, second = fim.numbers(
            b"fim context %d %d %d " % (draws.seed, draws.epoch, start) + content, draws.rate, draws.spm_share
        )
        if start == length or left - head <= fim.NUM_SENTINELS:
            mode = fim.PLAIN  # nothing to transform, or no room for it
        room = left - head - (fim.NUM_SENTINELS if mode != fim.PLAIN else 0)
        stop = min(length, start + room)
        ends = stop == length and length - start + eos <= room
        a, b = fim.cuts(mode, first, second, stop - start)
        yield ContextPiece(document, start, stop, mode, a, b, begins, ends)
        if ends:
            return
        start, begins, left = stop, False, width


def filled_rows(sizes: np.ndarray, width: int) -> list[list[int]]:
    """The indices of pieces laid one after the other, one list per row. sizes: int64 [n]."""
    row_of = (np.cumsum(sizes) - 1) // width
    return (
        [numbers.tolist() for numbers in np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(row_of)) + 1)]
        if len(sizes)
        else []
    )


def context_tokens(
    tokens: np.ndarray, piece: ContextPiece, bos: np.ndarray, eos: np.ndarray, ids: FimIds
) -> list[np.ndarray]:
    """The parts of a piece as it stands in its row. tokens: the document's own."""
    made = fim.transform(tokens[piece.start : piece.stop], piece.mode, piece.a, piece.b, ids)
    return [*([bos] if piece.begins else []), made, *([eos] if piece.ends else [])]
