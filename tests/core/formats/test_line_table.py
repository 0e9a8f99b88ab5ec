"""Line tables: streamed out, hashed once, read entry by entry; and every damage told with file and line."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from weftrain.core.errors import DataError
from weftrain.core.formats import line_table
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.line_table import LineTable, write_lines
from weftrain.core.formats.strict_model import StrictModel


class _Entry(StrictModel):
    name: str
    size: int


@pytest.mark.parametrize("block_bytes", [7, 64, 1 << 22])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    """Entries by index and in order, at block sizes that cut lines anywhere; the hash is the file's."""
    monkeypatch.setattr(line_table, "_BLOCK_BYTES", block_bytes)
    values: list[Any] = [{"name": "é" * (index % 9), "size": index} for index in range(200)]
    written = write_lines(tmp_path / "t.jsonl", iter(values))
    data = (tmp_path / "t.jsonl").read_bytes()
    assert data == b"".join(canonical_json(value) + b"\n" for value in values)
    assert (written.count, written.sha256) == (200, hashlib.sha256(data).hexdigest())
    with LineTable(tmp_path / "t.jsonl", _Entry.model_validate, sha256=written.sha256) as table:
        assert len(table) == 200
        assert [entry.model_dump() for entry in table] == values
        assert [table[index].size for index in (199, 0, 57)] == [199, 0, 57]
    assert os.listdir(tmp_path) == ["t.jsonl"]


def test_empty(tmp_path: Path) -> None:
    """A table of no lines."""
    assert write_lines(tmp_path / "t.jsonl", []).count == 0
    assert list(LineTable(tmp_path / "t.jsonl", dict)) == []


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line too long or a value that is not JSON: the error, the old bytes, and no temporary file."""
    write_lines(tmp_path / "t.jsonl", [1])
    monkeypatch.setattr(line_table, "MAX_LINE_BYTES", 10)
    for value, message in (("x" * 10, "a line of 13 bytes, 10 are allowed"), (float("nan"), "not JSON compliant")):
        with pytest.raises(ValueError, match=message):
            write_lines(tmp_path / "t.jsonl", [1, value])
    monkeypatch.setattr(line_table, "MAX_LINES", 2)
    with pytest.raises(ValueError, match="more than 2 lines"):
        write_lines(tmp_path / "t.jsonl", [1, 2, 3])
    assert (os.listdir(tmp_path), (tmp_path / "t.jsonl").read_bytes()) == (["t.jsonl"], b"1\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"name":"a","size":1}\n{"name":"b","size":"2"}\n', "line 2: .*size.*; put it back"),
        (b'{"name":"a","size":1}\n{"name"\n', "line 2: .*; put it back"),
        (b'{"name":"a","size":1}\n{"name":"b"', "does not end with a line break"),
        (b'{"name":"a","size":1}' + b" " * 99, "has a line of more than 60 bytes"),
        (b"\n" * 6, "has more than 5 lines"),
    ],
)
def test_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str) -> None:
    """Each names the file, the line and the remedy."""
    monkeypatch.setattr(line_table, "MAX_LINE_BYTES", 60)
    monkeypatch.setattr(line_table, "MAX_LINES", 5)
    path = tmp_path / "t.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"t.jsonl: {message}"):
        list(LineTable(path, _Entry.model_validate, remedy="put it back"))


def test_another_file(tmp_path: Path) -> None:
    """A hash that is not the recorded one, an index beyond the lines, a file that shrinks while open, a missing one, a
    FIFO.
    """
    path = tmp_path / "t.jsonl"
    write_lines(path, [1, 2])
    with pytest.raises(DataError, match=r"hashes to .*not to the recorded 0000"):
        LineTable(path, int, sha256="0" * 64)
    table = LineTable(path, int)
    for index in (2, -1):
        with pytest.raises(DataError, match="has 2 lines, and line"):
            table[index]
    os.truncate(path, 2)
    with pytest.raises(DataError, match="was truncated after it was opened"):
        table[1]
    with pytest.raises(DataError, match=r"none.jsonl: is missing"):
        LineTable(tmp_path / "none.jsonl", int)
    os.mkfifo(tmp_path / "fifo.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        LineTable(tmp_path / "fifo.jsonl", int)
