"""Fill-in-the-middle at the level of contexts: each document's piece in a row is drawn and transformed by itself, and
is whole there.

Documents are laid into rows one after the other. A piece with its three control tokens fits what is left of the row:
where a document does not, it is cut so that it does, and goes on in the next row as a piece of its own. So no row
overflows, no token is lost, every transformed piece has its prefix, suffix and middle in one row, and (mode, a, b) of
each piece gives the document back. Whether and where a piece is cut is a function of (seed, the document's hash, epoch,
where in the document the piece begins, its length).

Source: Bavarian et al. (2022), section 4, "context-level FIM", and StarCoder's training code: there a row is cut into
contexts first and what the control tokens push out of it is lost.
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
    """Own tokens start..stop-1 of a document, cut by (mode, a, b); a and b count from `start`. begins, ends: with bos,
    with eos.
    """

    document: int
    start: int
    stop: int
    mode: int
    a: int
    b: int
    begins: bool
    ends: bool

    def length(self, bos: int, eos: int) -> int:
        """Tokens in the row. bos, eos: tokens that stand before and after a document, 0 or 1."""
        sentinels = fim.NUM_SENTINELS if self.mode != fim.PLAIN else 0
        return self.begins * bos + sentinels + self.stop - self.start + self.ends * eos


def context_pieces(
    lengths: Sequence[int], contents: Sequence[bytes], width: int, draws: Draws, bos: int, eos: int, *, together: bool
) -> list[ContextPiece]:
    """The pieces of documents of these own lengths, each no longer than `width`, in order.

    together: the pieces one after the other fill rows of `width`, all but the last. Else each document begins a row of
    its own, and the caller packs the pieces.
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
    """One document's pieces. left: tokens that are left of the row it begins in, at least 1."""
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
    """The numbers of pieces of these sizes, int64 [n], that `together` laid one after the other, a list a row."""
    row_of = (np.cumsum(sizes) - 1) // width
    return (
        [numbers.tolist() for numbers in np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(row_of)) + 1)]
        if len(sizes)
        else []
    )


def context_tokens(
    tokens: np.ndarray, piece: ContextPiece, bos: np.ndarray, eos: np.ndarray, ids: FimIds
) -> list[np.ndarray]:
    """The parts of a piece as it stands in its row. tokens: the document's own [n]. bos, eos: [0 or 1]."""
    made = fim.transform(tokens[piece.start : piece.stop], piece.mode, piece.a, piece.b, ids)
    return [*([bos] if piece.begins else []), made, *([eos] if piece.ends else [])]
