"""Pieces of documents: written in the order of keys, gathered by ranges of keys and merged, as a plain sort of all
documents gives them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.data_prep.stages import pieces
from weftrain.data_prep.stages.pieces import DOCUMENT, Gathered, Piece, gather, sorted_places, write_piece
from weftrain.data_prep.stages.table_file import Table, write_table

Text = tuple[int, int]  # which text, and how many tokens it has


def gathered(part: int, numbers: list[int], masked: bool) -> Gathered:
    """A piece of texts, each told by its number: `number % 5` tokens of that value."""
    rows = np.zeros(len(numbers), DOCUMENT)
    for row, number in zip(rows, numbers, strict=True):
        digest = hashlib.sha256(b"%d" % number).digest()
        row["content"], row["key"] = np.frombuffer(digest, np.uint8), np.frombuffer(digest, ">u8")
        row["record"], row["num_bytes"], row["source"] = number, number % 5, number % 2
    rows["part"], rows["place"] = part, np.arange(len(numbers))
    order = sorted_places(rows)
    rows = rows[order]
    kept = [numbers[place] for place in order.tolist()]
    rows["end"] = np.cumsum([number % 5 for number in kept])
    tokens = np.concatenate([np.full(number % 5, number, np.uint16) for number in kept])
    return Gathered(
        rows,
        tokens,
        {"marks": np.full(len(tokens), 1, np.uint8), "weights": tokens.astype(np.float32)} if masked else {},
    )


def listed(found: Gathered) -> list[tuple[int, int, list[int]]]:
    """(part, record, tokens) of each document."""
    cuts = np.split(found.tokens, found.rows["end"][:-1]) if len(found.rows) else []
    return [
        (int(row["part"]), int(row["record"]), tokens.tolist()) for row, tokens in zip(found.rows, cuts, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=5),
    st.integers(0, 3),
    st.booleans(),
)
def test_ranges_one_after_the_other_are_all_documents_sorted_and_each_once(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], power: int, masked: bool
) -> None:
    folder, few = tmp_path_factory.mktemp("pieces"), 1 << power
    tables = []
    for part, numbers in enumerate(parts):
        write_piece(folder / f"{part}.table", gathered(part, numbers, masked and part % 2 == 0), {})
        tables.append(Piece(folder / f"{part}.table"))
    first = {number: part for part, numbers in reversed(list(enumerate(parts))) for number in numbers}
    by_key = sorted(first, key=lambda number: hashlib.sha256(b"%d" % number).digest())
    expected = [(first[number], number, [number] * (number % 5)) for number in by_key]
    assert [document for index in range(few) for document in listed(gather(tables, index, few))] == expected
    for run, of_run in enumerate((tables[:2], tables[2:])):
        for index in range(few if of_run else 0):
            write_piece(folder / f"run-{run}-{index}.table", gather(of_run, index, few), {})
    runs = range(1 + (len(tables) > 2))
    merged = [
        gather([Piece(folder / f"run-{run}-{index // 2}.table") for run in runs], index, 2 * few)
        for index in range(2 * few)
    ]
    assert [document for found in merged for document in listed(found)] == expected
    for found in merged:
        for plane in found.planes.values():
            assert len(plane) == len(found.tokens)
        # each weight came with its token, or with a piece that had none
        weights = found.planes.get("weights", np.ones(len(found.tokens)))
        assert ((weights == found.tokens) | (weights == 1)).all()


def test_a_key_range_of_a_large_piece_is_found_by_reading_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.zeros(5000, DOCUMENT)
    rows["key"][:, 0] = np.sort(np.random.default_rng(0).integers(0, 1 << 64, 5000, np.uint64))
    write_piece(tmp_path / "p.table", Gathered(rows, np.empty(0, np.uint16)), {})
    read, slices = [], Table.slice

    def counted(self: Table, name: str, start: int, stop: int) -> np.ndarray:
        read.append(stop - start)
        return slices(self, name, start, stop)

    monkeypatch.setattr(Table, "slice", counted)
    monkeypatch.setattr(pieces, "_ROWS_AT_ONCE", 8)
    low, high = 3 << 58, 4 << 58
    found = gather([Piece(tmp_path / "p.table")], 3, 64)
    inside = rows["key"][:, 0].astype(np.uint64)
    assert len(found.rows) == ((inside >= low) & (inside < high)).sum() > 20
    assert sum(read) < len(found.rows) + 100


def test_tokens_of_copies_are_not_read(tmp_path: Path) -> None:
    """A text that is in every piece is in memory once."""
    for part in range(6):
        write_piece(tmp_path / f"{part}.table", gathered(part, [4], False), {})
    found = gather([Piece(tmp_path / f"{part}.table") for part in range(6)], 0, 1)
    assert listed(found) == [(0, 4, [4, 4, 4, 4])]


def test_sources_and_records_are_those_of_all_inputs(tmp_path: Path) -> None:
    piece = gathered(0, [1, 2, 3], False)
    piece.rows["file"] = [7, 8, 7]
    write_piece(tmp_path / "p.table", piece, {})
    found = gather([Piece(tmp_path / "p.table", lambda: np.array([5, 9], np.int32), 7, 100)], 0, 1)
    expected = [(int(row["file"] == 7) * 100 + int(row["record"]), [5, 9][row["source"]]) for row in piece.rows]
    assert [(int(row["record"]), int(row["source"])) for row in found.rows] == expected


def test_a_table_that_was_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "work" / "parts" / "t.table"
    path.parent.mkdir(parents=True)
    write_table(path, {"a": np.arange(100), "b": np.empty((0, 3), np.uint8)}, {"note": 1})
    table = Table(path)
    assert (table["a"].tolist(), table["b"].shape, table.note) == (list(range(100)), (0, 3), {"note": 1})
    assert table.slice("a", 3, 5).tolist() == [3, 4]
    with pytest.raises(IndexError):
        table.slice("a", 99, 101)
    data = path.read_bytes()
    for length in (len(data) - 80, 30, 3):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"t\.table: cannot be read: .*; remove .*work and prepare again"):
            Table(path)["a"]
