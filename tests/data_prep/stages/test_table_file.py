"""Tables of a work folder: what is written comes back, in slices, and damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.stages.table_file import Table, write_table


def test_arrays_and_note_come_back_and_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    rows = np.array([((1, 2), 3), ((4, 5), 6)], [("key", ">u8", (2,)), ("end", "<i8")])
    arrays = {"rows": rows, "tokens": np.arange(10, dtype=np.uint16)[::2], "none": np.empty((0, 3), np.int64)}
    for name in ("a", "b"):
        write_table(tmp_path / name, arrays, {"sources": ["é"]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    table = Table(tmp_path / "a")
    assert table.note == {"sources": ["é"]}
    assert table.length("tokens") == 5
    assert "marks" not in table
    for name, array in arrays.items():
        assert table[name].dtype == array.dtype
        assert np.array_equal(table[name], array)
    assert table.slice("tokens", 1, 3).tolist() == [2, 4]
    with pytest.raises(IndexError, match="tokens"):
        table.slice("tokens", 4, 6)


def test_a_truncated_table_is_named_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "work" / "parts" / "00000.table"
    path.parent.mkdir(parents=True)
    write_table(path, {"tokens": np.arange(1000)}, {})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"00000.table: cannot be read: .*; remove {path.parent.parent} and prepare"):
        Table(path)["tokens"]
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(DataError, match="ends within its header"):
        Table(path)
