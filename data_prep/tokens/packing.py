"""Best-fit packing: whole documents into rows of row_tokens tokens, with few cuts and little padding.

A document longer than a row is cut into full rows and a rest. Rests and documents are then placed, longest first, each
into the fullest row that has room (best-fit decreasing; Johnson, "Near-optimal bin packing algorithms", 1973). Nothing
is dropped. Concatenated rows need no packing: they are windows of the stream.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PackedPiece(NamedTuple):
    """Tokens start..stop-1 of a document."""

    document: int
    start: int
    stop: int


def split(array: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Views of an array up to each of the rising ends; ten times as fast as np.split."""
    stops: list[int] = ends.tolist()
    return [array[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def separate_rows(lengths: np.ndarray, row_tokens: int) -> list[list[PackedPiece]]:
    """int64 [documents] lengths -> the pieces of each row: a document's own, cut where it is longer than a row."""
    return [
        [PackedPiece(document, start, min(start + row_tokens, length))]
        for document, length in enumerate(lengths.tolist())
        for start in range(0, length, row_tokens)
    ]


def best_fit_rows(lengths: np.ndarray, row_tokens: int) -> list[list[PackedPiece]]:
    """int64 [documents] lengths -> the pieces of each row, in document order; a function of the lengths alone."""
    pieces = [
        PackedPiece(document, start, min(start + row_tokens, length))
        for document, length in enumerate(lengths.tolist())
        for start in range(0, length, row_tokens)
    ]
    pieces.sort(key=lambda piece: (piece.start - piece.stop, piece.document, piece.start))
    rows: list[list[PackedPiece]] = []
    by_room: dict[int, list[int]] = {}  # tokens left -> rows with that room, the newest last
    # bit r is set where by_room[r] holds a row: the lowest set bit from `length` on is the fullest row that fits
    rooms = 0
    for piece in pieces:
        length = piece.stop - piece.start
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left := room - length:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    for pieces_of_row in rows:
        pieces_of_row.sort()
    return rows
