"""Parquet: every kind of column that holds text, any cut of rows, damage by row and by file, and memory that follows no
row group.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, split_parts

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'weftrain[data]'")
parquet = pytest.importorskip("pyarrow.parquet")
Read = Callable[..., list[Document | Failure]]
NULL = "column 'text' is null; give it a text, or leave the row out"


def found(items: list[Document | Failure]) -> list[str | None]:
    """Texts, and the reasons of failures."""
    return [item.text if isinstance(item, Document) else item.reason for item in items]


def test_any_cut_gives_the_rows_of_the_whole(tmp_path: Path, read_all: Read) -> None:
    path = tmp_path / "t.parquet"
    values: list[str | None] = [f"row {number}" for number in range(1500)]
    values[700] = None
    parquet.write_table(pa.table({"text": values, "kind": ["k"] * 1500, "n": range(1500)}), path, row_group_size=400)
    whole = read_all(path, source_key="kind")
    assert [item.record for item in whole] == list(range(1500))
    assert found(whole) == [value or NULL for value in values]
    assert [item.source for item in whole if isinstance(item, Document)] == ["k"] * 1499
    size = path.stat().st_size
    (file,) = list_inputs([str(path)], source=None)
    cuts = {}
    for pieces in (1, 2, 3, 5, 20, 5000):
        assert read_all(path, -(-size // pieces), source_key="kind") == whole
        parts = split_parts([file], -(-size // pieces))
        cuts[pieces] = [share.begin for part in parts for share in part.shares]
        assert sum(part.num_bytes for part in parts) in range(size - len(parts), size + 1)
    assert cuts[1] == [0]
    assert cuts[5] == [0, 400, 800, 1200]  # its row groups
    assert len(cuts[5000]) == 4 * 8  # a row group is cut into eight, each of which decodes it from its beginning


KINDS = {
    "string": pa.array(["a", None, "é"]),
    "large_string": pa.array(["a", None, "é"], pa.large_string()),
    "string_view": pa.array(["a", None, "é"], pa.string_view()),
    "binary": pa.array([b"a", None, "é".encode()]),
    "large_binary": pa.array([b"a", None, "é".encode()], pa.large_binary()),
    "dictionary": pa.array(["a", None, "é"]).dictionary_encode(),
    "dictionary of bytes": pa.array([b"a", None, "é".encode()]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_columns(tmp_path: Path, read_all: Read, kind: str) -> None:
    parquet.write_table(pa.table({"text": KINDS[kind]}), tmp_path / "t.parquet")
    assert found(read_all(tmp_path / "t.parquet")) == ["a", NULL, "é"]


def test_columns_within_structs_and_names_with_dots(tmp_path: Path, read_all: Read) -> None:
    structs = [
        {"id": 1, "text": "a", "from": {"site": "x"}},
        None,
        {"id": 2, "text": None, "from": None},
        {"text": "b", "from": {"site": ""}},
    ]
    table = pa.table({"n": range(4), "meta": structs, "meta.id": ["dotted"] * 4, "out.er": [{"text": "c"}] * 4})
    parquet.write_table(table, tmp_path / "t.parquet")
    null = "column 'meta.text' is null; give it a text, or leave the row out"
    assert found(read_all(tmp_path / "t.parquet", text_key="meta.text")) == ["a", null, null, "b"]
    items = read_all(tmp_path / "t.parquet", text_key="meta.text", source_key="meta.from.site")
    assert found(items)[3] == "column 'meta.from.site' holds no source's name; repair it, or leave --source-key out"
    assert isinstance(items[0], Document)
    assert items[0].source == "x"
    assert found(read_all(tmp_path / "t.parquet", text_key="meta.id")) == ["dotted"] * 4
    assert found(read_all(tmp_path / "t.parquet", text_key="out.er.text")) == ["c"] * 4


def test_columns_that_cannot_be_read(tmp_path: Path, read_all: Read) -> None:
    path = tmp_path / "t.parquet"
    arrays = [pa.array(["a"]), pa.array(["b"]), pa.array([1]), pa.array([[{"text": "a"}]]), pa.array([{"text": "a"}])]
    parquet.write_table(pa.Table.from_arrays(arrays, names=["text", "text", "n", "turns", "meta"]), path)
    for key, message in (
        ("text", "has 2 columns called 'text'; rename all but one"),
        ("absent", "has no column 'absent' but text, text, n, turns, meta; name it with --text-key"),
        ("n", "column 'n' holds int64, not text; name another with --text-key"),
        ("turns", "column 'turns' holds list<.*>, not text; name another with --text-key"),
        ("turns.text", "has no column 'turns.text' but"),
        ("meta", "column 'meta' holds struct<.*>, not text; name another with --text-key"),
        ("meta.txt", "has no column 'meta.txt' but"),
    ):
        with pytest.raises(DataError, match=rf"t\.parquet: {message}"):
            read_all(path, text_key=key)
    assert found(read_all(path, text_key="meta.text")) == ["a"]  # what is called twice is no hindrance elsewhere
    with pytest.raises(DataError, match=r"has no column 'lang' but .*; name it with --source-key"):
        read_all(path, text_key="meta.text", source_key="lang")


def test_a_value_that_is_not_utf8_or_too_long_is_its_rows_failure(
    tmp_path: Path, read_all: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (pa.string(), pa.binary()):
        parquet.write_table(pa.table({"text": pa.array([b"a", b"b\xff", b"c"]).view(kind)}), tmp_path / "t.parquet")
        bad = "column 'text': byte 1 is not UTF-8 (invalid start byte); convert it to UTF-8"
        assert found(read_all(tmp_path / "t.parquet")) == ["a", bad, "c"]
    monkeypatch.setattr(ReadOptions, "max_line_bytes", 1)
    assert found(read_all(tmp_path / "t.parquet"))[1] == "column 'text' holds more than 1 bytes; split the document"


def test_damage_and_a_second_compression(tmp_path: Path, read_all: Read) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"text": ["some text " * 9] * 900}), path, compression="NONE", use_dictionary=False)
    data = path.read_bytes()
    for damaged in (data[:-20] + b"\xff" * 10 + data[-10:], data[:-1], data[: len(data) // 2], b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet"):
            read_all(path)
    (tmp_path / "t.parquet.gz").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"t\.parquet\.gz: Parquet is compressed by itself.*; decompress it"):
        read_all(tmp_path / "t.parquet.gz", format="parquet")


def test_another_file_system() -> None:
    opened = io.BytesIO()
    parquet.write_table(pa.table({"text": [f"{number}" for number in range(50)]}), opened, row_group_size=20)
    system, base = fsspec.core.url_to_fs("memory://parquet-test/in")
    system.pipe_file(f"{base}/t.parquet", opened.getvalue())
    files = list_inputs(["memory://parquet-test/in"], source=None)
    for part_bytes in (1 << 40, opened.tell() // 3):
        texts = [
            item.text
            for part in split_parts(files, part_bytes)
            for item in read_part(files, part, ReadOptions())
            if isinstance(item, Document)
        ]
        assert texts == [f"{number}" for number in range(50)]


def test_a_large_row_group_is_read_a_page_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"text": [f"{number} " + "word " * 2000 for number in range(7_000)]})  # 70 MB
    parquet.write_table(table, path, row_group_size=1 << 30, compression="NONE", use_dictionary=False)
    del table
    script = """
import sys
import pyarrow
from weftrain.data_prep.readers.documents import Document, InputFile, Share
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.parquet import READERS
file = InputFile(sys.argv[1], "t", "s", "parquet", 0, None)
print(sum(isinstance(item, Document) for item in READERS[0].read(0, file, Share(0, 0, -1), ReadOptions())))
print(pyarrow.default_memory_pool().max_memory())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    documents, peak_bytes = map(int, done.stdout.split())
    assert documents == 7_000
    assert peak_bytes < 40 << 20
