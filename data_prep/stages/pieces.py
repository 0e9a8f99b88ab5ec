"""Documents between the stages: pieces of parts, and slices of runs that pieces are merged into, in one table form.

`rows` has a DOCUMENT each, in key order (or as read), `tokens` their ids in sequence, and each plane that any document
has (marks.py) a value for each token. Of equal texts a table holds the one that was read first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.data_prep.marks import PLANES, plain
from weftrain.data_prep.stages.table_file import Table, write_table

# key: where the document stands in the shuffle, 32 bytes as four numbers. content: SHA-256 of its text or ids. end: one
# past its tokens. part, place: when it was read. file, record: where it lies. source: index into the names of the
# table, of all inputs in a run's slice.
DOCUMENT = np.dtype(
    [
        ("key", ">u8", (4,)),
        ("content", "|u1", (32,)),
        ("end", "<i8"),
        ("place", "<i8"),
        ("record", "<i8"),
        ("num_bytes", "<i8"),
        ("part", "<i4"),
        ("file", "<i4"),
        ("source", "<i4"),
        ("heldout", "|u1"),
    ]
)
_KEYS = 1 << 64  # values of a key's first number
_ROWS_AT_ONCE = 1 << 10


@dataclass
class Gathered:
    """Documents in order: rows DOCUMENT [n] with `end` counting through `tokens` [length]; planes: those that a
    document has (marks.py), [length] each.
    """

    rows: np.ndarray
    tokens: np.ndarray
    planes: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.rows["end"], prepend=0)


@dataclass(frozen=True)
class Piece:
    """A table of documents. sources: reads the dataset's number of each of its sources; None: rows have those already.
    base: the part begins at this record of file base_file.
    """

    path: Path
    sources: Callable[[], np.ndarray] | None = None
    base_file: int = -1
    base: int = 0


def write_piece(path: Path, gathered: Gathered, note: dict[str, Any]) -> None:
    """Raises OSError."""
    write_table(path, {"rows": gathered.rows, "tokens": gathered.tokens, **gathered.planes}, note)


def sorted_places(rows: np.ndarray) -> np.ndarray:
    """DOCUMENT [n] -> int64 [kept]: rows in key order; of equal texts the one that was read first."""
    first = rows["key"][:, 0].astype(np.uint64)
    order = np.argsort(first, kind="stable")
    if len(rows) > 1 and (np.diff(first[order]) == 0).any():  # equal texts, or one of a billion chances
        keys = [rows["key"][:, column].astype(np.uint64) for column in (3, 2, 1)]
        order = np.lexsort((rows["place"], rows["part"], *keys, first))
        content = rows["content"][order]
        order = order[np.append(True, (content[1:] != content[:-1]).any(axis=1))]
    return order


def gather(pieces: Sequence[Piece], index: int, count: int, *, as_read: bool = False) -> Gathered:
    """The documents of all pieces with keys in range `index` of `count` equal ones. as_read: one whole piece, unsorted.
    Rows are read and sorted first, then the tokens of the kept rows, piece by piece.
    """
    found = [_rows(piece, index, count, as_read) for piece in pieces]
    rows = np.concatenate([of_piece for of_piece, _ in found])
    order = np.arange(len(rows)) if as_read else sorted_places(rows)
    from_piece = np.repeat(np.arange(len(found)), [len(of_piece) for of_piece, _ in found])[order]
    stops = rows["end"][order]
    starts = np.concatenate([start for _, start in found])[order]
    rows = rows[order]
    rows["end"] = np.cumsum(stops - starts)
    tokens: np.ndarray | None = None
    planes: dict[str, np.ndarray] = {}
    for number in np.unique(from_piece).tolist():
        chosen = np.flatnonzero(from_piece == number)
        table = Table(pieces[number].path)
        low, high = int(starts[chosen].min()), int(stops[chosen].max())
        source = table.slice("tokens", low, high)
        if tokens is None:
            tokens = np.empty(int(rows["end"][-1]), source.dtype)
        places = list(
            zip(
                (starts[chosen] - low).tolist(),
                (stops[chosen] - low).tolist(),
                rows["end"][chosen].tolist(),
                strict=True,
            )
        )
        _scatter(tokens, source, places)
        for name in PLANES:
            if name in table:
                plane = planes.setdefault(name, plain(name, len(tokens)))
                _scatter(plane, table.slice(name, low, high), places)
    if tokens is None:
        tokens = np.empty(0, Table(pieces[0].path).slice("tokens", 0, 0).dtype)
    return Gathered(rows, tokens, planes)


def _scatter(target: np.ndarray, source: np.ndarray, places: list[tuple[int, int, int]]) -> None:
    """target[...end] = source[start:stop] for each (start, stop, end)."""
    for start, stop, end in places:
        target[end - stop + start : end] = source[start:stop]


def _rows(piece: Piece, index: int, count: int, as_read: bool) -> tuple[np.ndarray, np.ndarray]:
    """A piece's rows in a range of keys, with sources and records of all inputs; and where their tokens begin."""
    table = Table(piece.path)
    low, high = 0, table.length("rows")
    if not as_read:
        low = _first_at(table, _KEYS // count * index, low, high)
        high = _first_at(table, _KEYS // count * (index + 1), low, high) if index < count - 1 else high
    rows = table.slice("rows", low, high)
    before = int(table.slice("rows", low - 1, low)["end"][0]) if low else 0
    starts = np.append(before, rows["end"][:-1]) if len(rows) else np.empty(0, np.int64)
    if piece.sources is not None:
        rows["source"] = piece.sources()[rows["source"]]
    if piece.base:
        rows["record"] += np.where(rows["file"] == piece.base_file, piece.base, 0)
    return rows, starts


def _first_at(table: Table, key: int, low: int, high: int) -> int:
    """The first of rows low..high-1, sorted by key, whose key begins with `key` or more; else `high`."""
    while high - low > _ROWS_AT_ONCE:  # a binary search that reads a row a step
        middle = (low + high) // 2
        if int(table.slice("rows", middle, middle + 1)["key"][0, 0]) < key:
            low = middle + 1
        else:
            high = middle
    return low + int(np.searchsorted(table.slice("rows", low, high)["key"][:, 0].astype(np.uint64), np.uint64(key)))
